"""What grows while a run trains: its events, its log text and its metrics."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from services.api.catalog import Catalog
from services.api.feeds import Position, log_feed, metric_feed
from services.api.routes.dependencies import CatalogDep, problems
from services.api.schemas import EventFeed, Feed, LogLine
from wa_core.errors import WeightAveragingError
from wa_core.records import Entry

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["feeds"])

EVENT_STREAM = "text/event-stream"
MAX_LINES = 10_000
_MAX_EVENTS = 1000
_POLL_S = 0.5
_KEEPALIVE_S = 15.0
_MAX_SEQ = 10**10 - 1

Limit = Annotated[int, Query(ge=1, le=MAX_LINES)]
After = Annotated[str | None, Query(description="the `next` of the page before")]


@router.get("/events", response_model=EventFeed, responses=problems(404, 422))
async def list_events(
    run_id: str,
    request: Request,
    catalog: CatalogDep,
    after: Annotated[int, Query(ge=0, le=_MAX_SEQ, description="entries after this seq")] = 0,
    limit: Annotated[int, Query(ge=1, le=_MAX_EVENTS)] = 100,
) -> Response | EventFeed:
    """The run's log: a JSON page, or server-sent events when asked for `text/event-stream`.

    A stream goes on after `Last-Event-ID` (or `after`) and ends with the run.
    """
    entries = await run_in_threadpool(catalog.entries, run_id)
    if EVENT_STREAM in request.headers.get("accept", ""):
        last_id = request.headers.get("last-event-id", "")
        seq = int(last_id) if re.fullmatch(r"\d{1,10}", last_id, re.ASCII) else after
        stream = _event_stream(request, catalog, run_id, after=seq)
        return StreamingResponse(stream, media_type=EVENT_STREAM, headers={"Cache-Control": "no-store"})
    page = entries[after : after + limit]
    return EventFeed(
        data=[_event(entry) for entry in page],
        has_more=after + limit < len(entries),
        next=page[-1].seq if page else after,
    )


@router.get("/logs", responses=problems(404, 422))
def read_logs(
    run_id: str,
    catalog: CatalogDep,
    rank: Annotated[str, Query(pattern=r"^[a-z0-9-]{1,32}$", description="a rank, or `driver`")] = "0",
    attempt: Annotated[int | None, Query(ge=1, le=9999, description="one attempt; all without it")] = None,
    after: After = None,
    limit: Limit = 1000,
) -> Feed[LogLine]:
    """The lines that one rank wrote."""
    position = Position.parse(after)
    attempts = range(1, _last_attempt(catalog, run_id) + 1) if attempt is None else [attempt]
    return log_feed(catalog.store, run_id, rank=rank, attempts=attempts, after=position, limit=limit)


@router.get("/metrics", responses=problems(404, 422))
def read_metrics(
    run_id: str, catalog: CatalogDep, after: After = None, limit: Limit = 1000
) -> Feed[dict[str, Any]]:
    """The metric lines of a run: `attempt`, `step`, and whatever the recipe measures."""
    position = Position.parse(after)
    attempts = range(1, _last_attempt(catalog, run_id) + 1)
    return metric_feed(catalog.store, run_id, attempts=attempts, after=position, limit=limit)


def _last_attempt(catalog: Catalog, run_id: str) -> int:
    entries = catalog.entries(run_id)
    return entries[-1].attempt if entries else 0


def _event(entry: Entry) -> dict[str, Any]:
    return entry.model_dump(mode="json", exclude={"write_id", "format"})


async def _event_stream(request: Request, catalog: Catalog, run_id: str, *, after: int) -> AsyncIterator[bytes]:
    clock = request.app.state.clock
    seq, spoke_at = after, clock.monotonic()
    while not request.app.state.stop.is_set:
        try:
            entries = await run_in_threadpool(catalog.entries, run_id)
        except WeightAveragingError:
            return  # the store is away: the client comes back with Last-Event-ID
        for entry in entries[seq:]:
            data = entry.model_dump_json(exclude={"write_id", "format"})
            yield format_sse_event(data_str=data, event=entry.kind, id=str(entry.seq))
        if len(entries) > seq:
            seq, spoke_at = len(entries), clock.monotonic()
        if entries and entries[-1].state.is_terminal:
            return
        if clock.monotonic() - spoke_at > _KEEPALIVE_S:
            yield KEEPALIVE_COMMENT
            spoke_at = clock.monotonic()
        await asyncio.sleep(_POLL_S)
