"""Serves a file of weights over HTTP: validators, ranges and digests (RFC 9110, RFC 9530).

The content's sha256 is its strong ETag, so a cut download can go on only with the very same bytes. Bytes go
straight from the store to the caller, one chunk in memory at a time.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from anyio import to_thread
from starlette.responses import RedirectResponse, Response, StreamingResponse

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

    from wa_core.records import FileRef
    from wa_core.store.base import ObjectStore

PRESIGNED_FOR_S = 3600
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
    chunks = store.stream(file.key, start=(span or whole).start, end=(span or whole).end)
    headers["Content-Length"] = str((span or whole).length)
    if span is not None:
        headers["Content-Range"] = span.content_range
    threads: CapacityLimiter = request.app.state.download_threads
    return StreamingResponse(sent_in_threads(chunks, threads), status_code=206 if span else 200, headers=headers)


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
