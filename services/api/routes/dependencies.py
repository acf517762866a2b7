"""What routes are given, and the answers that all of them may give."""

import hashlib
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


async def entries_of(run_id: str, catalog: Catalog) -> tuple[Entry, ...]:
    """A run's log, as it is now, or was a moment ago while many ask."""
    if (run := catalog.recent(run_id)) is not None:
        return run.entries
    return await run_in_threadpool(catalog.entries, run_id, anew=True)


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
    headers = {"ETag": etag_of(body), "Cache-Control": "private, no-cache"}
    if etag_matches(request.headers.get("if-none-match"), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)
