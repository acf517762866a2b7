"""Landscapes of an average: asked for here, worked out by an averager."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from services.api.answers.landscapes import check_possible, landscape_resource
from services.api.asked.body import read_landscape_request
from services.api.routes.dependencies import CatalogDep, problems
from services.api.schemas import LandscapeResource, Listing
from wa_core.catalog.jobs import Job
from wa_core.catalog.landscapes import Landscapes
from wa_core.records import LandscapeRequest

router = APIRouter(prefix="/v1/runs/{run_id}/averages/{name}/landscapes", tags=["insight"])


@router.post(
    "",
    status_code=202,
    responses=problems(400, 404, 408, 409, 413, 415, 422),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/LandscapeRequest"}}},
        }
    },
)
def ask_for_landscape(
    run_id: str,
    name: str,
    wanted: Annotated[LandscapeRequest, Depends(read_landscape_request)],
    request: Request,
    response: Response,
    catalog: CatalogDep,
) -> LandscapeResource:
    """Ask for the loss along a line or over a plane; an averager works it out when it has nothing else to do."""
    check_possible(catalog, run_id, name)
    record = Landscapes(catalog.store, run_id, name).ask(wanted, clock=request.app.state.clock)
    response.headers["Location"] = f"/v1/runs/{run_id}/averages/{name}/landscapes/{record.landscape_id}"
    return landscape_resource(Job(record, None, None))


@router.get("", responses=problems(404))
def list_landscapes(run_id: str, name: str, catalog: CatalogDep) -> Listing[LandscapeResource]:
    """List the newest landscapes of an average, newest first, without their numbers."""
    catalog.wanted(run_id, name)
    found = catalog.newest_jobs(Landscapes(catalog.store, run_id, name))
    return Listing(data=[landscape_resource(one, is_short=True) for one in found])


@router.get("/{landscape_id}", responses=problems(404))
def show_landscape(run_id: str, name: str, landscape_id: str, catalog: CatalogDep) -> LandscapeResource:
    """Show a landscape: how far the work on it is, and its numbers once it is done."""
    catalog.wanted(run_id, name)
    return landscape_resource(Landscapes(catalog.store, run_id, name).fetch(landscape_id))
