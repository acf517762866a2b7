"""What grows while a run trains: its events, its log text and its metrics."""

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from services.api.answers.feeds import LineFeed, Position, log_feed, metric_feed
from services.api.answers.streams import EVENT_STREAM, line_events, log_events, stream_response, wants_stream
from services.api.problems import HttpProblem
from services.api.routes.dependencies import (
    UNCHANGED,
    CatalogDep,
    body_response,
    log_response,
    problems,
)
from services.api.schemas import EventFeed, Feed, LogLine
from services.api.state.catalog import Catalog, PageKey
from wa_core.records import Entry

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["feeds"])

MAX_LINES = 10_000
_MAX_EVENTS = 1000
_MAX_SEQ = 10**10 - 1
_SETTLED_AFTER = timedelta(minutes=1)  # what a run wrote in its last moments may arrive after its end
_MAX_BYTES_KEPT = 32 << 10

Limit = Annotated[int, Query(ge=1, le=MAX_LINES)]
After = Annotated[
    str | None, Query(pattern=r"^[0-9]{1,4}-[0-9]{1,8}-[0-9]{1,9}$", description="the `next` of the page before")
]


Follow = Annotated[bool, Query(description="server-sent events until the run has ended, instead of a page")]

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "a page, or a stream of events",
        "content": {EVENT_STREAM: {"schema": {"type": "string"}}},
    }
}


@router.get("/events", response_model=EventFeed, responses=problems(404, 422) | UNCHANGED | _STREAM)
async def list_events(
    run_id: str,
    request: Request,
    catalog: CatalogDep,
    after: Annotated[int, Query(ge=0, le=_MAX_SEQ, description="entries after this seq")] = 0,
    limit: Annotated[int, Query(ge=1, le=_MAX_EVENTS)] = 100,
) -> Response:
    """The run's log: a JSON page, or server-sent events when asked for `text/event-stream`.

    A stream goes on after `Last-Event-ID` (or `after`) and ends with the run.
    """
    if wants_stream(request):
        # Asked for before the answer begins, so that a run that does not exist is 404.
        await run_in_threadpool(catalog.spec, run_id)
        return stream_response(log_events(request.app.state, run_id, after=_seq_after(request, after)))
    make = partial(_events, after=after, limit=limit)
    return await log_response(request, run_id, catalog, make, key=("events", after, limit))


@router.get("/logs", response_model=Feed[LogLine], responses=problems(404, 422) | UNCHANGED | _STREAM)
async def read_logs(
    run_id: str,
    request: Request,
    catalog: CatalogDep,
    rank: Annotated[str, Query(pattern=r"^[a-z0-9-]{1,32}$", description="a rank, or `driver`")] = "0",
    attempt: Annotated[int | None, Query(ge=1, le=9999, description="one attempt; all without it")] = None,
    *,
    follow: Follow = False,
    after: After = None,
    limit: Limit = 1000,
) -> Response:
    """The lines that one rank wrote: a JSON page, or with `follow` server-sent events until the run has ended."""
    lines = _Lines(run_id, log_feed(run_id, rank=rank), catalog, rank=rank, attempt=attempt, limit=limit)
    return await lines.answer(request, after=after, follow=follow, event="log")


@router.get("/metrics", response_model=Feed[dict[str, Any]], responses=problems(404, 422) | UNCHANGED | _STREAM)
async def read_metrics(
    run_id: str,
    request: Request,
    catalog: CatalogDep,
    *,
    follow: Follow = False,
    after: After = None,
    limit: Limit = 1000,
) -> Response:
    """The metric lines of a run: `attempt`, `step`, and whatever the recipe measures. `follow` as for logs."""
    lines = _Lines(run_id, metric_feed(run_id), catalog, limit=limit)
    return await lines.answer(request, after=after, follow=follow, event="metrics")


class _Lines:
    """A feed of lines as it was asked for."""

    def __init__(
        self,
        run_id: str,
        feed: LineFeed[Any],
        catalog: Catalog,
        *,
        rank: str = "",
        attempt: int | None = None,
        limit: int,
    ) -> None:
        self._run_id = run_id
        self._feed = feed
        self._catalog = catalog
        self._rank = rank
        self._attempt = attempt
        self._limit = limit

    async def answer(self, request: Request, *, after: str | None, follow: bool, event: str) -> Response:
        """A page, or a stream."""
        position = Position.parse(after)
        if not (follow or wants_stream(request)):
            key = (self._run_id, event, self._rank, self._attempt, position, self._limit)
            body = self._catalog.pages_of_ended.peek(key)
            if body is None:
                body = await run_in_threadpool(self._page, position, key)
            return body_response(request, body)
        # Asked before the answer begins, so that a run that does not exist is 404.
        await run_in_threadpool(self._catalog.spec, self._run_id)
        position = _position_after(request, position)
        events = line_events(request.app.state, self._run_id, self._read, after=position, event=event)
        return stream_response(events)

    def _page(self, position: Position, key: PageKey) -> bytes:
        entries = self._catalog.entries(self._run_id)
        attempts = self._attempts(entries)
        page = self._feed.page(self._catalog.store, attempts, after=position, limit=self._limit)
        body = page.model_dump_json().encode()
        if not _ended_before(entries, self._catalog.clock.now() - _SETTLED_AFTER) or len(body) > _MAX_BYTES_KEPT:
            return body
        return self._catalog.pages_of_ended.get(key, lambda: body)

    def _read(self, position: Position) -> tuple[list[tuple[Position, Any]], bool]:
        attempts = self._attempts(self._catalog.entries(self._run_id))
        return self._feed.read(self._catalog.store, attempts, after=position, limit=self._limit)

    def _attempts(self, entries: Sequence[Entry]) -> list[int]:
        last = entries[-1].attempt if entries else 0
        return list(range(1, last + 1)) if self._attempt is None else [self._attempt]


def _ended_before(entries: Sequence[Entry], moment: datetime) -> bool:
    end = next((entry for entry in entries if entry.state.is_terminal), None)
    return end is not None and end.at is not None and end.at < moment


def _events(entries: Sequence[Entry], *, after: int, limit: int) -> EventFeed:
    page = entries[after : after + limit]
    has_more, following = after + limit < len(entries), page[-1].seq if page else after
    return EventFeed(data=[_event(entry) for entry in page], has_more=has_more, next=following)


def _event(entry: Entry) -> dict[str, Any]:
    return entry.model_dump(mode="json", exclude={"write_id", "format"})


def _seq_after(request: Request, after: int) -> int:
    last_id = request.headers.get("last-event-id", "")
    return int(last_id) if re.fullmatch(r"\d{1,10}", last_id, re.ASCII) else after


def _position_after(request: Request, after: Position) -> Position:
    last_id = request.headers.get("last-event-id")
    try:
        return Position.parse(last_id) if last_id else after
    except HttpProblem:
        return after
