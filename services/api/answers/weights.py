"""Serves a file of weights over HTTP: validators, ranges and digests (RFC 9110, RFC 9530).

The content's sha256 is its strong ETag, so a cut download can go on only with the very same bytes. Bytes go
straight from the store to the caller: past this program where there is a way (ADR 54), else one chunk in memory at
a time.
"""

from __future__ import annotations

import base64
from functools import partial
from typing import TYPE_CHECKING

from anyio import to_thread
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse, Response, StreamingResponse

from services.api.access.connections import RELAY
from services.api.access.observation import RELAYED_BYTES
from services.api.answers.origin import open_origin
from services.api.answers.ranges import (
    Span,
    UnsatisfiableRangeError,
    etag_matches,
    range_still_applies,
    requested_span,
)
from services.api.problems import HttpProblem

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from anyio import CapacityLimiter
    from starlette.requests import Request

    from services.api.access.connections import Relay
    from services.api.answers.origin import Origin
    from wa_core.records import FileRef
    from wa_core.store.base import ObjectStore, ReachableStore

PRESIGNED_FOR_S = 3600
_OPENED_WITHIN_S = 60
MAX_DOWNLOADS = 16  # chunks that are read at once; further downloads wait for their turn, chunk by chunk


def download_response(
    request: Request, store: ObjectStore, file: FileRef, *, filename: str, redirect: bool
) -> Response:
    """Answer GET or HEAD for `file`, or with `redirect` a GET with the way to the store itself, if it has one.

    Raises:
        HttpProblem: as `weights_response`.
        ObjectNotFoundError: a cleaner has removed the file.
    """
    # Such an address is signed for one method, and it is not HEAD's.
    if redirect and request.method == "GET" and (elsewhere := redirect_response(store, file)):
        return elsewhere
    return weights_response(request, store, file, filename=filename)


def weights_response(request: Request, store: ObjectStore, file: FileRef, *, filename: str) -> Response:
    """Answer GET or HEAD for `file`.

    Raises:
        HttpProblem: 412 or 416, as the request's conditions and range demand.
        ObjectNotFoundError: a cleaner has removed the file.
    """
    etag = f'"{file.sha256}"'
    headers = _headers(file, etag=etag, filename=filename)
    if (if_match := request.headers.get("if-match")) is not None and not _matches_strongly(if_match, etag):
        raise HttpProblem(f"the content is {etag}, not {if_match[:200]}", status=412, code="content_changed")
    if etag_matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers={"ETag": etag, "Cache-Control": headers["Cache-Control"]})
    if request.method == "HEAD":
        store.head(file.key)
        return Response(headers=headers | {"Content-Length": str(file.size_bytes)})
    span = _span(request, file, etag=etag)
    whole = Span(0, file.size_bytes, file.size_bytes)
    headers["Content-Length"] = str((span or whole).length)
    if span is not None:
        headers["Content-Range"] = span.content_range
    body = _body(request, store, file.key, span or whole)
    return StreamingResponse(body, status_code=206 if span else 200, headers=headers)


def _body(request: Request, store: ObjectStore, key: str, span: Span) -> AsyncIterator[bytes]:
    """A part of a file, opened at once: one that is not there can still be refused.

    Raises:
        ObjectNotFoundError: it is not there.
    """
    threads: CapacityLimiter = request.app.state.download_threads
    if (origin := _origin(request, key, span)) is not None:
        return _relayed(request, store, key, span, origin=origin)
    return sent_in_threads(store.stream(key, start=span.start, end=span.end), threads)


def _origin(request: Request, key: str, span: Span) -> Origin | None:
    """The store's own answer, if there are ways from there to this process, and past it."""
    reachable: ReachableStore | None = request.app.state.reachable_store
    if reachable is None or not hasattr(request.state, RELAY):
        return None
    with request.app.state.metrics.store.observed("stream"):
        return open_origin(reachable.nearby_url(key, expires_s=_OPENED_WITHIN_S), span)


async def _relayed(
    request: Request, store: ObjectStore, key: str, span: Span, *, origin: Origin
) -> AsyncIterator[bytes]:
    """What was read with the answer's head; what the kernel moves comes between; then what is left, in chunks."""
    relay: Relay = getattr(request.state, RELAY)
    with origin:
        yield origin.first
        try:
            num_moved = await relay(request.scope, origin.socket, span.length - len(origin.first))
        except OSError:
            raise ClientDisconnect from None
    setattr(request.state, RELAYED_BYTES, num_moved)
    begin = span.start + len(origin.first) + num_moved
    if begin < span.end:  # the store's connection broke; its adapter knows what to do
        threads: CapacityLimiter = request.app.state.download_threads
        rest = await to_thread.run_sync(partial(store.stream, key, start=begin, end=span.end), limiter=threads)
        async for chunk in sent_in_threads(rest, threads):
            yield chunk


async def sent_in_threads(chunks: Iterator[bytes], threads: CapacityLimiter) -> AsyncIterator[bytes]:
    """The chunks, read in threads of the downloads' own: however many there are, other requests have theirs."""
    while (chunk := await to_thread.run_sync(next, chunks, None, limiter=threads)) is not None:
        yield chunk


def redirect_response(store: ObjectStore, file: FileRef) -> Response | None:
    """Send the caller to the store itself, or None when the store has no such addresses."""
    url = store.presign(file.key, expires_s=PRESIGNED_FOR_S)
    if url is None:
        return None
    # What is there is told here, since the store has other ETags and digests.
    headers = {"Cache-Control": "no-store", "ETag": f'"{file.sha256}"', "Repr-Digest": _digest(file)}
    return RedirectResponse(url, status_code=307, headers=headers)


def _headers(file: FileRef, *, etag: str, filename: str) -> dict[str, str]:
    return {
        "Content-Type": "application/octet-stream",
        "Content-Disposition": f'attachment; filename="{filename}"',
        "ETag": etag,
        "Repr-Digest": _digest(file),
        "Accept-Ranges": "bytes",
        # The same address serves newer weights later; the ETag makes asking again cheap.
        "Cache-Control": "private, no-cache",
    }


def _digest(file: FileRef) -> str:
    return f"sha-256=:{base64.b64encode(bytes.fromhex(file.sha256)).decode()}:"


def _span(request: Request, file: FileRef, *, etag: str) -> Span | None:
    if not range_still_applies(request.headers.get("if-range"), etag):
        return None
    try:
        return requested_span(request.headers.get("range"), size_bytes=file.size_bytes)
    except UnsatisfiableRangeError:
        raise HttpProblem(
            f"the range is outside the file's {file.size_bytes} bytes",
            status=416,
            code="range_not_satisfiable",
            headers={"Content-Range": f"bytes */{file.size_bytes}", "Accept-Ranges": "bytes"},
        ) from None


def _matches_strongly(header: str, etag: str) -> bool:
    return any(part.strip() in {"*", etag} for part in header.split(","))
