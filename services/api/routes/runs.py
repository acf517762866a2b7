"""Submit, list and watch runs, and say what is to become of them."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi import Query as Param
from starlette.concurrency import run_in_threadpool

from services.api.access.auth import CODE, owner_of, require_scope
from services.api.access.observation import traceparent_of
from services.api.access.rates import limit_submissions
from services.api.answers.ranges import etag_matches
from services.api.answers.resources import checkpoint_resources, run_resource
from services.api.asked import wishes
from services.api.asked.body import read_resumption, read_run_request
from services.api.asked.filters import RUN_ID, run_query
from services.api.asked.keys import MAX_KEY_CHARS
from services.api.asked.quota import check_quota
from services.api.asked.submission import check_submission, submitted_before, submitted_run
from services.api.asked.webhooks import check_webhooks
from services.api.routes.dependencies import UNCHANGED, CatalogDep, log_response, problems
from services.api.schemas import CheckpointResource, Page, RunResource
from services.api.state.catalog import Catalog
from services.api.state.index import Query, Row
from services.api.state.watching import POLL_S
from wa_core.records import Entry, Resumption, RunRequest

router = APIRouter(prefix="/v1", tags=["runs"])

MAX_WAIT_S = 60
MAX_PAGE = 200
MAX_CHECKPOINTS = 10_000


@router.post(
    "/runs",
    status_code=202,
    response_model=RunResource,
    dependencies=[Depends(limit_submissions)],
    responses=problems(400, 403, 408, 409, 413, 415, 422),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/RunRequest"}}},
        }
    },
)
async def submit_run(
    wanted: Annotated[RunRequest, Depends(read_run_request)],
    request: Request,
    catalog: CatalogDep,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="sent again with the same body, it names the same run",
            json_schema_extra={"minLength": 1, "maxLength": MAX_KEY_CHARS, "pattern": "^[ -~]+$"},
        ),
    ] = None,
) -> Response:
    """Submit a run. It waits until a runner takes it."""
    if wanted.package is not None:
        require_scope(request, CODE)
    row = None
    if idempotency_key is not None:
        row = submitted_before(catalog, wanted, key=idempotency_key, owner=owner_of(request))
    if row is None:
        row = await run_in_threadpool(_submitted, request, wanted, key=idempotency_key, catalog=catalog)
    headers = {"Location": f"/v1/runs/{row.run_id}"}
    return Response(row.body, status_code=202, media_type="application/json", headers=headers)


def _submitted(request: Request, wanted: RunRequest, *, key: str | None, catalog: Catalog) -> Row:
    check_submission(wanted, catalog.store)
    check_webhooks(wanted.webhooks, request.app.state.webhooks)
    owner, most = owner_of(request), request.app.state.max_queued_per_owner
    check_quota(catalog, owner=owner, key=key, most=most)
    return submitted_run(catalog, wanted, key=key, owner=owner, traceparent=traceparent_of(request))


@router.get("/runs", response_model=Page[RunResource], responses=problems(422))
async def list_runs(
    catalog: CatalogDep,
    wanted: Annotated[Query, Depends(run_query)],
    limit: Annotated[int, Param(ge=1, le=MAX_PAGE)] = 50,
    after: Annotated[str | None, Param(pattern=RUN_ID, description="the `next` of the page before")] = None,
) -> Response:
    """List runs, newest first; the filters narrow the list down together."""
    found = catalog.index.recent_page(wanted, before=after, limit=limit + 1)
    if found is None:
        found = await run_in_threadpool(catalog.index.page, wanted, before=after, limit=limit + 1)
    page, has_more = found[:limit], len(found) > limit
    following = json.dumps(page[-1].run_id if has_more else None)
    rows = b",".join(row.body for row in page)
    end = f'],"has_more":{json.dumps(has_more)},"next":{following}}}'
    return Response(b'{"data":[' + rows + end.encode(), media_type="application/json")


@router.get(
    "/runs/{run_id}",
    response_model=RunResource,
    responses=problems(404, 422) | UNCHANGED,
)
async def show_run(
    run_id: str,
    request: Request,
    catalog: CatalogDep,
    wait: Annotated[float, Param(ge=0, le=MAX_WAIT_S, description="seconds to wait for a change")] = 0,
) -> Response:
    """Show a run; with `wait`, once it differs from `If-None-Match` (or from what it is now)."""
    known = request.headers.get("if-none-match")
    recent = catalog.recent_row(run_id)
    row = await run_in_threadpool(catalog.row, run_id) if recent is None else recent
    known_or_first = known or row.etag
    if wait and not row.is_over and etag_matches(known_or_first, row.etag):
        row = await _changed(request, row, unlike=known_or_first, wait_s=wait)
    headers = {"ETag": row.etag, "Cache-Control": "private, no-cache"}
    if etag_matches(known, row.etag):
        return Response(status_code=304, headers=headers)
    return Response(row.body, media_type="application/json", headers=headers)


@router.post("/runs/{run_id}:cancel", status_code=202, responses=problems(404, 409))
def cancel_run(run_id: str, catalog: CatalogDep) -> RunResource:
    """Ask for a run's end: at once when it waits, at a step boundary when it trains."""
    return run_resource(catalog.ask(run_id, wishes.cancel))


@router.post("/runs/{run_id}:pause", status_code=202, responses=problems(404, 409))
def pause_run(run_id: str, catalog: CatalogDep) -> RunResource:
    """Ask for a pause: at once when a run waits, at a step boundary after a last checkpoint when it trains."""
    return run_resource(catalog.ask(run_id, wishes.pause))


@router.post(
    "/runs/{run_id}:resume",
    status_code=202,
    responses=problems(400, 404, 408, 409, 413, 415, 422),
    openapi_extra={
        "requestBody": {
            "required": False,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Resumption"}}},
        }
    },
)
def resume_run(
    run_id: str, wanted: Annotated[Resumption, Depends(read_resumption)], catalog: CatalogDep
) -> RunResource:
    """Let a paused run go on; with `from_step`, let any run that trains go back to an older step."""
    return run_resource(catalog.ask(run_id, partial(wishes.resume, wanted=wanted)))


@router.get(
    "/runs/{run_id}/checkpoints",
    response_model=Page[CheckpointResource],
    responses=problems(404, 422) | UNCHANGED,
)
async def list_checkpoints(
    run_id: str,
    request: Request,
    catalog: CatalogDep,
    limit: Annotated[int, Param(ge=1, le=MAX_CHECKPOINTS)] = 1000,
    after: Annotated[int, Param(ge=0, lt=10**10, description="the `next` of the page before")] = 0,
) -> Response:
    """List a run's committed checkpoints, in order; those of abandoned branches are marked."""
    make = partial(_checkpoints, after=after, limit=limit)
    return await log_response(request, run_id, catalog, make, key=("checkpoints", after, limit))


def _checkpoints(entries: Sequence[Entry], *, after: int, limit: int) -> Page[CheckpointResource]:
    found = [checkpoint for checkpoint in checkpoint_resources(entries) if checkpoint.seq > after]
    page, has_more = found[:limit], len(found) > limit
    return Page(data=page, has_more=has_more, next=str(page[-1].seq) if has_more else None)


async def _changed(request: Request, row: Row, *, unlike: str, wait_s: float) -> Row:
    """The run once its ETag is not in `unlike`, or as it is when the time is over or nobody waits any more."""
    state = request.app.state
    deadline, version = state.clock.monotonic() + wait_s, 0
    look = partial(state.catalog.row, row.run_id)
    async with state.watches.of(("row", row.run_id), look, mark=lambda seen: seen.etag) as watched:
        while (left_s := deadline - state.clock.monotonic()) > 0:
            if state.stop.is_set or await request.is_disconnected():
                break
            newer = await watched.newer_than(version, timeout_s=min(left_s, POLL_S))
            if newer is not None:
                row, version = newer, watched.version
            if row.is_over or not etag_matches(unlike, row.etag):
                break
    return row
