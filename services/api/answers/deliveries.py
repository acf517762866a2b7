"""What became of the messages to a run's webhooks: those that there are to send, and what has been written down.

It shows hosts, no addresses: those may hold a secret. A message of which nothing has been written down is pending:
not sent yet, or tried again; of tries under way the bucket knows nothing (ADR 22).
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from services.api.schemas import DeliveryResource, Page
from wa_core.catalog.deliveries import average_event_id, fetch_delivery, list_deliveries, log_event_id
from wa_core.catalog.runs import requested_averages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.api.state.catalog import Catalog
    from wa_core.records import Entry, RunSpec


def delivery_page(catalog: Catalog, run_id: str, *, after: str, limit: int) -> Page[DeliveryResource]:
    """The messages of a run, by webhook and event, after the one called `after`.

    Raises:
        RunNotFoundError: there is no such run.
    """
    spec, entries = catalog.spec(run_id), catalog.entries(run_id)
    wanted = sorted(_messages(catalog, spec, entries), key=lambda one: one.delivery_id)
    left = [one for one in wanted if one.delivery_id > after]
    told = list_deliveries(catalog.store, run_id) if left else set()

    def settled(one: DeliveryResource) -> DeliveryResource:
        return _settled(catalog, run_id, one) if (one.webhook, one.event_id) in told else one

    page = catalog.side_by_side(settled, left[:limit])
    has_more = len(left) > limit
    return Page(data=page, has_more=has_more, next=page[-1].delivery_id if has_more else None)


def _messages(catalog: Catalog, spec: RunSpec, entries: Sequence[Entry]) -> list[DeliveryResource]:
    """All that there is to tell so far, as if nothing had been."""
    webhooks = list(enumerate(spec.request.webhooks))
    events: list[tuple[str, str]] = [(entry.kind, log_event_id(entry.seq)) for entry in entries]
    if any("published" in webhook.events for _, webhook in webhooks):
        for average in requested_averages(spec, entries):
            numbers = catalog.assessed_numbers(spec.run_id, average.name)
            events += [("published", average_event_id(average.name, number)) for number in numbers]
    return [
        DeliveryResource(
            delivery_id=f"{number:02d}-{event_id}",
            webhook=number,
            host=urlsplit(webhook.url).hostname or "",
            event=kind,
            event_id=event_id,
            outcome="pending",
        )
        for number, webhook in webhooks
        for kind, event_id in events
        if kind in webhook.events
    ]


def _settled(catalog: Catalog, run_id: str, one: DeliveryResource) -> DeliveryResource:
    found = fetch_delivery(catalog.store, run_id, webhook=one.webhook, event_id=one.event_id)
    return one.model_copy(
        update={
            "outcome": found.outcome,
            "at": found.at,
            "status": found.status,
            "num_tries": found.num_tries or None,
            "message": found.message,
        }
    )
