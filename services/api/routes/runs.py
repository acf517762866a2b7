"""Submit, list and watch runs, and say what is to become of them."""

import asyncio
import hashlib
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from services.api import wishes
from services.api.auth import CODE, owner_of, require_scope
from services.api.body import read_resumption, read_run_request
from services.api.catalog import Catalog, RunSnapshot
from services.api.observation import traceparent_of
from services.api.problems import HttpProblem
from services.api.ranges import etag_matches
from services.api.resources import checkpoint_resources, run_resource
from services.api.routes.dependencies import CatalogDep, problems
from services.api.schemas import CheckpointResource, Listing, Page, RunResource
from services.api.submission import check_key, check_submission
from services.api.webhooks import check_webhooks
from wa_core import layout
from wa_core.catalog.runs import submit
from wa_core.catalog.submissions import submit_once
from wa_core.records import Resumption, RunRequest, RunState

router = APIRouter(prefix="/v1", tags=["runs"])

MAX_WAIT_S = 60
MAX_PAGE = 200
_POLL_S = 0.5


@router.post(
    "/runs",
    status_code=202,
    responses=problems(400, 403, 408, 413, 415, 422),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/RunRequest"}}},
        }
    },
)
def submit_run(
    wanted: Annotated[RunRequest, Depends(read_run_request)],
    request: Request,
    response: Response,
    catalog: CatalogDep,
    idempotency_key: Annotated[
        str | None, Header(description="sent again with the same body, it names the same run")
    ] = None,
) -> RunResource:
    """Submit a run. It waits until a runner takes it."""
    if wanted.package is not None:
        require_scope(request, CODE)
    check_submission(wanted, catalog.store)
    check_webhooks(wanted.webhooks, request.app.state.webhooks)
    store, clock, owner = catalog.store, request.app.state.clock, owner_of(request)
    trace = traceparent_of(request)
    if idempotency_key is None:
        spec = submit(store, wanted, clock=clock, owner=owner, traceparent=trace)
    else:
        check_key(idempotency_key)
        spec = submit_once(store, wanted, key=idempotency_key, clock=clock, owner=owner, traceparent=trace)
    response.headers["Location"] = f"/v1/runs/{spec.run_id}"
    return run_resource(catalog.snapshot(spec.run_id))


@router.get("/runs", responses=problems(422))
def list_runs(
    catalog: CatalogDep,
    state: Annotated[RunState | None, Query(description="only runs in this state")] = None,
    label: Annotated[list[str] | None, Query(description="only runs with this `key:value`; may repeat")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    after: Annotated[str | None, Query(description="the `next` of the page before")] = None,
) -> Page[RunResource]:
    """List runs, newest first."""
    if after is not None and not layout.is_run_id(after):
        raise _invalid("query.after", f"{after[:100]!r} is no cursor; use the `next` of a page")
    labels = dict(_label(text) for text in label or [])
    found = list(islice(_matching(catalog, state=state, labels=labels, after=after), limit + 1))
    page = found[:limit]
    has_more = len(found) > limit
    return Page(data=page, has_more=has_more, next=page[-1].run_id if has_more else None)


@router.get("/runs/{run_id}", response_model=RunResource, responses=problems(404, 422))
async def show_run(
    run_id: str,
    request: Request,
    catalog: CatalogDep,
    wait: Annotated[float, Query(ge=0, le=MAX_WAIT_S, description="seconds to wait for a change")] = 0,
) -> Response:
    """Show a run; with `wait`, once it differs from `If-None-Match` (or from what it is now)."""
    clock = request.app.state.clock
    deadline = clock.monotonic() + wait
    known = request.headers.get("if-none-match")
    body, is_over = await run_in_threadpool(_run_body, catalog, run_id)
    known_or_first = known or _etag(body)
    while (
        etag_matches(known_or_first, _etag(body))
        and not is_over
        and clock.monotonic() < deadline
        and not request.app.state.stop.is_set
        and not await request.is_disconnected()
    ):
        await asyncio.sleep(_POLL_S)
        body, is_over = await run_in_threadpool(_run_body, catalog, run_id)
    headers = {"ETag": _etag(body), "Cache-Control": "private, no-cache"}
    if etag_matches(known, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


@router.post("/runs/{run_id}:cancel", status_code=202, responses=problems(404, 409))
def cancel_run(run_id: str, catalog: CatalogDep) -> RunResource:
    """Ask for a run's end: at once when it waits, at a step boundary when it trains."""
    catalog.ask(run_id, wishes.cancel)
    return run_resource(catalog.snapshot(run_id))


@router.post("/runs/{run_id}:pause", status_code=202, responses=problems(404, 409))
def pause_run(run_id: str, catalog: CatalogDep) -> RunResource:
    """Ask for a pause: at once when a run waits, at a step boundary after a last checkpoint when it trains."""
    catalog.ask(run_id, wishes.pause)
    return run_resource(catalog.snapshot(run_id))


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
    catalog.ask(run_id, partial(wishes.resume, wanted=wanted))
    return run_resource(catalog.snapshot(run_id))


@router.get("/runs/{run_id}/checkpoints", responses=problems(404))
def list_checkpoints(run_id: str, catalog: CatalogDep) -> Listing[CheckpointResource]:
    """List a run's committed checkpoints, in order; those of abandoned branches are marked."""
    return Listing(data=checkpoint_resources(catalog.entries(run_id)))


def _run_body(catalog: Catalog, run_id: str) -> tuple[bytes, bool]:
    resource = run_resource(catalog.snapshot(run_id))
    return resource.model_dump_json().encode(), resource.state.is_terminal


def _etag(body: bytes) -> str:
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'


def _matching(
    catalog: Catalog, *, state: RunState | None, labels: dict[str, str], after: str | None
) -> Iterator[RunResource]:
    run_ids = catalog.run_ids(before=after)
    for start in range(0, len(run_ids), MAX_PAGE // 4):
        for run in catalog.snapshots(run_ids[start : start + MAX_PAGE // 4]):
            if _has_labels(run, labels) and (state is None or run_resource(run).state is state):
                yield run_resource(run)


def _has_labels(run: RunSnapshot, labels: dict[str, str]) -> bool:
    return labels.items() <= run.spec.request.labels.items()


def _label(text: str) -> tuple[str, str]:
    key, colon, value = text.partition(":")
    if not colon:
        raise _invalid("query.label", f"{text[:100]!r} is no label; write key:value")
    return key, value


def _invalid(pointer: str, message: str) -> HttpProblem:
    return HttpProblem(f"{pointer}: {message}", status=422, code="invalid_request", faults=[(pointer, message)])
