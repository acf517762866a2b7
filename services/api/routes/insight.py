"""What an average did, generation by generation, and what another one would be."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from services.api.access.auth import READ, scope
from services.api.answers.history import MAX_PAGE, History
from services.api.answers.resources import preview_resource
from services.api.asked.body import WantedRule, read_wanted_rule
from services.api.asked.submission import check_rule
from services.api.routes.dependencies import MAX_GENERATION, CatalogDep, problems
from services.api.schemas import AveragePreview, GenerationPage

router = APIRouter(prefix="/v1/runs/{run_id}", tags=["insight"])


def history_of(request: Request) -> History:
    """The application's histories."""
    history: History = request.app.state.history
    return history


@router.get("/averages/{name}/generations", responses=problems(404, 422))
def list_generations(
    run_id: str,
    name: str,
    history: Annotated[History, Depends(history_of)],
    after: Annotated[int, Query(ge=0, le=MAX_GENERATION, description="the `next` of the page before")] = 0,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    is_whole: Annotated[bool, Query(alias="all", description="those that were never assessed, too")] = False,  # noqa: FBT002  a query
) -> GenerationPage:
    """List an average's generations, oldest first: what was in them, when they were out, how they measured."""
    return history.page(run_id, name, after=after, limit=limit, is_whole=is_whole)


@router.post(
    "/averages:preview",
    responses=problems(400, 404, 408, 413, 415, 422),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/WantedRule"}}},
        }
    },
)
@scope(READ)
def preview_average(
    run_id: str, wanted: Annotated[WantedRule, Depends(read_wanted_rule)], catalog: CatalogDep
) -> AveragePreview:
    """Say what an average by another rule would be of the checkpoints so far, without reading any weights."""
    rule = check_rule(wanted.rule)
    return preview_resource(catalog.holdings(catalog.snapshot(run_id)), rule)
