"""What routes are given, and the answers that all of them may give."""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import Annotated, Any

from fastapi import Depends, Query, Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from services.api.answers.ranges import etag_matches
from services.api.problems import MEDIA_TYPE
from services.api.schemas import Problem
from services.api.state.catalog import Catalog
from services.api.state.snapshots import RunSnapshot
from wa_core.records import Entry

#: The highest that its key has digits for.
MAX_GENERATION = 99_999_999
_MAX_KEPT = 8  # answers of one snapshot: callers choose pages as they like
_MAX_BYTES_KEPT = 16 << 10

UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "it is what If-None-Match names"}}


# Asynchronous, although they wait for nothing: others are given to a thread each time.
async def catalog_of(request: Request) -> Catalog:
    """The application's catalogue."""
    catalog: Catalog = request.app.state.catalog
    return catalog


CatalogDep = Annotated[Catalog, Depends(catalog_of)]


async def run_of(run_id: str, catalog: CatalogDep) -> RunSnapshot:
    """The run that a path names, as it is now, or was a moment ago while many ask."""
    recent = catalog.recent(run_id)
    return await run_in_threadpool(catalog.snapshot, run_id, anew=True) if recent is None else recent


RunDep = Annotated[RunSnapshot, Depends(run_of)]


async def log_response(
    request: Request,
    run_id: str,
    catalog: Catalog,
    make: Callable[[Sequence[Entry]], BaseModel],
    *,
    key: Hashable,
) -> Response:
    """What `make` makes of a run's log, as it is now, or was a moment ago while many ask. See `kept_response`."""
    if (run := catalog.recent(run_id)) is not None:
        return kept_response(request, run, lambda: make(run.entries), key=key)
    return json_response(request, make(await run_in_threadpool(catalog.entries, run_id, anew=True)))


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problem answers of a route, for its description; 401, 429 and 503 go without saying."""
    schema = {"$ref": f"#/components/schemas/{Problem.__name__}"}
    content = {MEDIA_TYPE: {"schema": schema}}
    return {status: {"description": "problem", "content": content} for status in (401, *statuses, 429, 503)}


FILE_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "the file", "content": {"application/octet-stream": {}}},
    206: {"description": "the range asked for", "content": {"application/octet-stream": {}}},
    304: {"description": "the caller has it already"},
    307: {"description": "the store's own address, when asked for with redirect"},
    **problems(404, 412, 416, 422),
}

Redirect = Annotated[bool, Query(description="go to the store itself, where it can be reached")]


def etag_of(body: bytes) -> str:
    """The validator of an answer."""
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def json_response(request: Request, resource: BaseModel) -> Response:
    """A resource with its validator, or 304 when the caller has it already."""
    return body_response(request, resource.model_dump_json().encode())


def body_response(request: Request, body: bytes) -> Response:
    """JSON with its validator, or 304 when the caller has it already."""
    return _validated(request, body, etag=etag_of(body))


def kept_response(request: Request, run: RunSnapshot, make: Callable[[], BaseModel], *, key: Hashable) -> Response:
    """`json_response` with a resource made of `run` alone; whoever asks for `key` again gets the same bytes."""
    kept = run.rendered.get(key)
    if kept is None:
        body = make().model_dump_json().encode()
        kept = body, etag_of(body)
        if len(run.rendered) < _MAX_KEPT and len(body) <= _MAX_BYTES_KEPT:
            run.rendered[key] = kept
    body, etag = kept
    return _validated(request, body, etag=etag)


def _validated(request: Request, body: bytes, *, etag: str) -> Response:
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    if etag_matches(request.headers.get("if-none-match"), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)
