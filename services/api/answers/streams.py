"""Server-sent events about a run: its log as it grows, and the lines that it writes, until it has ended.

Each event's id is where a client goes on that comes back with Last-Event-ID. A store that is away ends a stream,
and so does the end of the process: the client comes back.
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from services.api.state.watching import POLL_S
from wa_core.errors import WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.datastructures import State
    from starlette.requests import Request

    from services.api.answers.feeds import Position
    from services.api.state.catalog import Catalog
    from wa_core.records import Entry

    Read = Callable[[Position], tuple[list[tuple[Position, Any]], bool]]

EVENT_STREAM = "text/event-stream"
_KEEPALIVE_S = 15.0
_LINES_POLL_S = 1.0


def wants_stream(request: Request) -> bool:
    """Whether the caller asks for events and not for a page."""
    return EVENT_STREAM in request.headers.get("accept", "").lower()


def stream_response(events: AsyncIterator[bytes]) -> StreamingResponse:
    """The answer with `events` in it."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type=EVENT_STREAM, headers=headers)


async def log_events(state: State, run_id: str, *, after: int) -> AsyncIterator[bytes]:
    """The entries of a run's log after `after`, and those to come."""
    seq = after
    async for entries in _seen(state, run_id):
        for entry in entries[seq:]:
            data = entry.model_dump_json(exclude={"write_id", "format"})
            yield format_sse_event(data_str=data, event=entry.kind, id=str(entry.seq))
        if not entries:
            yield KEEPALIVE_COMMENT
        seq = max(seq, len(entries))


async def line_events(
    state: State, run_id: str, read: Read, *, after: Position, event: str
) -> AsyncIterator[bytes]:
    """The lines after `after`, and those to come."""
    position, has_more, clock = after, True, state.clock
    spoke_at = clock.monotonic()
    while True:
        # Asked before the lines are read: what a run wrote before its end is then not missed.
        is_over = await run_in_threadpool(_is_over, state.catalog, run_id)
        try:
            lines, has_more = await run_in_threadpool(read, position)
        except WeightAveragingError:
            return
        for position, line in lines:
            data = json.dumps(line) if isinstance(line, dict) else line.model_dump_json()
            yield format_sse_event(data_str=data, event=event, id=str(position))
            spoke_at = clock.monotonic()
        if has_more:
            continue
        if is_over or state.stop.is_set:
            return
        if clock.monotonic() - spoke_at > _KEEPALIVE_S:
            yield KEEPALIVE_COMMENT
            spoke_at = clock.monotonic()
        await asyncio.sleep(_LINES_POLL_S)


async def _seen(state: State, run_id: str) -> AsyncIterator[tuple[Entry, ...]]:
    """The whole log at each change, until the run has ended; now and then an empty one, as a sign of life."""
    version, clock = 0, state.clock
    spoke_at = clock.monotonic()
    look = partial(state.catalog.entries, run_id, anew=True)
    async with state.watches.of(("entries", run_id), look, mark=len) as watched:
        while not state.stop.is_set:
            try:
                entries = await watched.newer_than(version, timeout_s=POLL_S)
            except WeightAveragingError:
                return
            if entries is not None:
                version = watched.version
                yield entries
                if entries and entries[-1].state.is_terminal:
                    return
            elif clock.monotonic() - spoke_at < _KEEPALIVE_S:
                continue
            else:
                yield ()
            spoke_at = clock.monotonic()


def _is_over(catalog: Catalog, run_id: str) -> bool:
    try:
        entries = catalog.entries(run_id)
    except WeightAveragingError:
        return False
    return bool(entries) and entries[-1].state.is_terminal
