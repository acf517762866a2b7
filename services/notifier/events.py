"""What there is to tell of a run: entries of its log, and averages that can be downloaded.

Everything about an event follows from records that never change: its id, its time, and every byte that is sent. So
an event that is sent twice is the same message twice.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from wa_core.catalog.averages import headline
from wa_core.catalog.deliveries import average_event_id, log_event_id
from wa_core.records import AttemptFailed, Failed, TrainingFinished, WebhookEvent

if TYPE_CHECKING:
    from datetime import datetime

    from wa_core.records import AssessmentRecord, Entry, RunSpec

_KINDS = frozenset(get_args(WebhookEvent))


@dataclass(frozen=True, slots=True)
class Event:
    """Something to tell. `event_id` is its name within the run, `kind` what a webhook asks for."""

    event_id: str
    kind: str
    at: datetime
    body: bytes


def of_entry(spec: RunSpec, entry: Entry, *, public_url: str) -> Event | None:
    """The event that a log entry is, or None for entries that nobody is told of."""
    if entry.kind not in _KINDS:
        return None
    at = entry.at or spec.created_at
    data: dict[str, Any] = {"state": entry.state, "attempt": entry.attempt, "seq": entry.seq}
    if isinstance(entry, AttemptFailed | Failed):
        data |= {"reason": entry.reason, "message": entry.message}
    if isinstance(entry, TrainingFinished):
        data |= {"step": entry.step, "metrics": entry.metrics}
    body = _message(f"run.{entry.kind}", at, spec, data, url=f"{public_url}/v1/runs/{spec.run_id}")
    return Event(log_event_id(entry.seq), entry.kind, at, body)


def of_assessment(spec: RunSpec, record: AssessmentRecord, *, public_url: str) -> Event:
    """The event that a generation of an average can be downloaded."""
    found = record.assessment
    data = {
        "average": record.name,
        "generation": record.generation,
        "step": found.averaged.step if found.averaged else None,
        "loss": headline(found),
        "won": found.comparison.won if found.comparison else None,
        "is_best": record.best == record.generation,
    }
    url = f"{public_url}/v1/runs/{spec.run_id}/averages/{record.name}?generation={record.generation}"
    body = _message("average.published", record.at, spec, data, url=url)
    return Event(average_event_id(record.name, record.generation), "published", record.at, body)


def _message(kind: str, at: datetime, spec: RunSpec, data: dict[str, Any], *, url: str) -> bytes:
    about = {"run_id": spec.run_id, "labels": spec.request.labels, **data, "url": url}
    return json.dumps({"type": kind, "timestamp": at.isoformat(), "data": about}, ensure_ascii=False).encode()
