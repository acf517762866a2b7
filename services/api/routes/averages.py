"""A run's averages, and their weights to download."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from services.api.access.auth import MODELS, scope
from services.api.answers.provenance import averaged_stem
from services.api.answers.resources import average_resource, prediction_resource
from services.api.answers.weights import download_response
from services.api.asked.body import AverageAddition, read_addition
from services.api.asked.selection import Selection, best_generation, select, select_file
from services.api.asked.submission import check_addition
from services.api.routes.dependencies import (
    FILE_ANSWERS,
    MAX_GENERATION,
    UNCHANGED,
    CatalogDep,
    Redirect,
    RunDep,
    json_response,
    kept_response,
    problems,
)
from services.api.schemas import AddedAverage, AverageResource, Page
from services.api.state.catalog import Catalog
from services.api.state.snapshots import AverageSnapshot, RunSnapshot
from wa_core.catalog.catch_up import plan_catch_up
from wa_core.catalog.history import lineage
from wa_core.records import MAX_AVERAGES, AverageRequest, CheckpointCommitted

router = APIRouter(prefix="/v1/runs/{run_id}/averages", tags=["averages"])


async def selection(
    generation: Annotated[int | None, Query(ge=1, le=MAX_GENERATION)] = None,
    step: Annotated[int | None, Query(ge=0, lt=10**12, description="step of the last checkpoint in it")] = None,
    at: Annotated[Literal["latest", "best"] | None, Query(description="best: lowest held-out loss")] = None,
) -> Selection:
    """Which generation is wanted."""
    return Selection(generation=generation, step=step, at=at)


SelectionDep = Annotated[Selection, Depends(selection)]


@router.get("", response_model=Page[AverageResource], responses=problems(404, 422) | UNCHANGED)
async def list_averages(
    run: RunDep,
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_AVERAGES)] = MAX_AVERAGES,
    after: Annotated[int, Query(ge=0, le=MAX_AVERAGES, description="the `next` of the page before")] = 0,
) -> Response:
    """List a run's averages, in the order in which they were asked for."""
    return kept_response(
        request, run, lambda: _page(run, after=after, limit=limit), key=("averages", after, limit)
    )


def _page(run: RunSnapshot, *, after: int, limit: int) -> Page[AverageResource]:
    there = list(zip(run.wanted, run.averages, strict=True))
    end, checkpoints = after + limit, run.lineage
    page = [_resource(run.spec.run_id, *each, checkpoints=checkpoints) for each in there[after:end]]
    has_more = end < len(there)
    return Page(data=page, has_more=has_more, next=str(end) if has_more else None)


@router.post(
    "",
    status_code=202,
    responses={
        200: {"description": "what it would take; nothing was added", "model": AddedAverage},
        **problems(400, 404, 408, 409, 413, 415, 422),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/AverageAddition"}}},
        }
    },
)
def add_average(
    run_id: str,
    wanted: Annotated[AverageAddition, Depends(read_addition)],
    response: Response,
    catalog: CatalogDep,
) -> AddedAverage:
    """Add an average to a run, also to one that has ended: replayed, or rebuilt from what is kept."""
    run = catalog.snapshot(run_id)
    average = AverageRequest(**wanted.model_dump(exclude={"dry_run"}))
    rule = check_addition(average, existing=run.wanted)
    plan = plan_catch_up(catalog.holdings(run), rule)
    if wanted.dry_run:
        response.status_code = 200
    else:
        run = catalog.add_average(run_id, average)
        response.headers["Location"] = f"/v1/runs/{run_id}/averages/{average.name}"
    resource = average_resource(run_id, average, shown=None, served=None, best=None, checkpoints=run.lineage)
    return AddedAverage(**dict(resource), prediction=prediction_resource(plan))


@router.get("/{name}", response_model=AverageResource, responses=problems(404, 409, 422) | UNCHANGED)
async def show_average(
    run_id: str, name: str, request: Request, catalog: CatalogDep, chosen: SelectionDep
) -> Response:
    """Show an average: its newest generation, or the one asked for."""
    run = catalog.recent(run_id) if chosen.is_newest else None
    if run is not None and any(average.name == name for average in run.averages):
        return kept_response(request, run, lambda: _newest(run, name), key=("average", name))
    resource = await run_in_threadpool(_chosen, run_id, name, catalog=catalog, chosen=chosen)
    return json_response(request, resource)


def _newest(run: RunSnapshot, name: str) -> AverageResource:
    found = zip(run.wanted, run.averages, strict=True)
    wanted, average = next(both for both in found if both[0].name == name)
    return _resource(run.spec.run_id, wanted, average, checkpoints=run.lineage)


def _resource(
    run_id: str, wanted: AverageRequest, average: AverageSnapshot, *, checkpoints: Sequence[CheckpointCommitted]
) -> AverageResource:
    best = average.served.best if average.served else None
    return average_resource(
        run_id, wanted, shown=average.newest, served=average.served, best=best, checkpoints=checkpoints
    )


def _chosen(run_id: str, name: str, *, catalog: Catalog, chosen: Selection) -> AverageResource:
    wanted = catalog.wanted(run_id, name)
    shown, served = select(catalog, run_id, name, chosen)
    # The newest assessment and the best one name the best; an older one may name one that has been beaten since.
    is_older = chosen.generation is not None or chosen.step is not None
    best = best_generation(catalog, run_id, name) if is_older else served.best if served else None
    checkpoints = lineage(catalog.entries(run_id))
    return average_resource(run_id, wanted, shown=shown, served=served, best=best, checkpoints=checkpoints)


@dataclass(frozen=True, slots=True)
class Download:
    """What every download is asked for."""

    run_id: str
    name: str
    request: Request
    catalog: CatalogDep
    chosen: SelectionDep
    redirect: Redirect = False

    def of(self, file: str) -> Response:
        """The answer with `file` in it, or with the way to it."""
        served, ref = select_file(self.catalog, self.run_id, self.name, self.chosen, file=file)
        stem = averaged_stem(self.run_id, self.name, served.generation)
        filename = f"{stem}.{file.rpartition('.')[2]}"
        store = self.catalog.store
        return download_response(self.request, store, ref, filename=filename, redirect=self.redirect)


DownloadDep = Annotated[Download, Depends()]


# One route for each file and not a pattern: what can be downloaded is a short list, and it is in the description.
@router.head("/{name}/weights.safetensors", include_in_schema=False)  # noqa: FAST003  Download takes it
@router.get("/{name}/weights.safetensors", response_class=Response, responses=FILE_ANSWERS | problems(409))
@scope(MODELS)
def download_safetensors(download: DownloadDep) -> Response:
    """Download averaged weights as safetensors. Ranges, If-Range and digests work."""
    return download.of("weights.safetensors")


@router.head("/{name}/weights.pt", include_in_schema=False)  # noqa: FAST003  Download takes it
@router.get("/{name}/weights.pt", response_class=Response, responses=FILE_ANSWERS | problems(409))
@scope(MODELS)
def download_pickle(download: DownloadDep) -> Response:
    """Download averaged weights as a state dict for `torch.load(..., weights_only=True)`."""
    return download.of("weights.pt")
