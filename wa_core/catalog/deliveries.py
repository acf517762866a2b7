"""What has been told to webhooks: one create-once record for each event of each webhook, and a marker per run.

The marker says that a run has webhooks and may still have something to tell; it is advice, as all markers are.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.catalog.commit import COMMIT_PATIENCE_S, commit, parse
from wa_core.errors import ConflictError
from wa_core.records import Delivery, Marker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.records import RunSpec
    from wa_core.store.base import ObjectStore


def mark_telling(store: ObjectStore, spec: RunSpec) -> None:
    """Let notifiers look at a run, if anybody wants to be told of it."""
    if spec.request.webhooks:
        marker = Marker(run_id=spec.run_id, at=spec.created_at)
        store.put(layout.telling_marker(spec.run_id), marker.model_dump_json().encode())


def unmark_telling(store: ObjectStore, spec: RunSpec) -> None:
    """Everything of a run has been told. If it has become active again meanwhile, the marker stays after all."""
    store.delete(layout.telling_marker(spec.run_id))
    if any(True for _ in store.list(layout.active_marker(spec.run_id))):
        mark_telling(store, spec)


def list_telling(store: ObjectStore) -> Iterator[str]:
    """The ids of runs that may have something to tell, oldest first."""
    return (run_id for info in store.list(layout.TELLING) if (run_id := layout.run_id_of(info.key)))


def log_event_id(seq: int) -> str:
    """The id of the event that an entry of a run's log is."""
    return f"log-{seq:010d}"


def average_event_id(name: str, generation: int) -> str:
    """The id of the event that a generation of an average can be downloaded."""
    return f"average-{name}-{generation:08d}"


def list_deliveries(store: ObjectStore, run_id: str) -> set[tuple[int, str]]:
    """(webhook, event id) of all that a run has told, or that was given up."""
    prefix = layout.deliveries_prefix(run_id)
    found = (re.fullmatch(r"(\d+)/(.+)\.json", info.key.removeprefix(prefix)) for info in store.list(prefix))
    return {(int(match[1]), match[2]) for match in found if match}


def fetch_delivery(store: ObjectStore, run_id: str, *, webhook: int, event_id: str) -> Delivery:
    """What became of one event.

    Raises:
        ObjectNotFoundError: nothing yet.
        CorruptError: the record cannot be read.
    """
    key = layout.delivery(run_id, webhook=webhook, event_id=event_id)
    return parse(Delivery.model_validate_json, store.get(key), key=key)


def commit_delivery(store: ObjectStore, delivery: Delivery, *, patience_s: float = COMMIT_PATIENCE_S) -> bool:
    """Write down what became of an event; False when another notifier has done so before.

    Raises:
        TransientError: the store is away; committing the same delivery again is safe.
    """
    key = layout.delivery(delivery.run_id, webhook=delivery.webhook, event_id=delivery.event_id)
    try:
        commit(store, key, delivery, patience_s=patience_s)
    except ConflictError:
        return False
    return True
