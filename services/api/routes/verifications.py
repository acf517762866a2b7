"""Verifications of an average: asked for here, done by an averager."""

from fastapi import APIRouter, Request, Response

from services.api.answers.verifications import verification_resource
from services.api.asked.selection import select_file
from services.api.routes.averages import SelectionDep
from services.api.routes.dependencies import CatalogDep, problems
from services.api.schemas import Listing, VerificationResource
from wa_core.catalog.jobs import Job
from wa_core.catalog.verifications import Verifications

router = APIRouter(prefix="/v1/runs/{run_id}/averages/{name}", tags=["insight"])


@router.post(":verify", status_code=202, responses=problems(404, 409, 422))
def verify_average(
    run_id: str, name: str, chosen: SelectionDep, request: Request, response: Response, catalog: CatalogDep
) -> VerificationResource:
    """Have an idle averager recompute published weights from the kept checkpoints, and compare every bit."""
    served, _ = select_file(catalog, run_id, name, chosen, file="weights.safetensors")
    clock = request.app.state.clock
    record = Verifications(catalog.store, run_id, name).ask(served.generation, clock=clock)
    response.headers["Location"] = f"/v1/runs/{run_id}/averages/{name}/verifications/{record.verification_id}"
    return verification_resource(Job(record, None, None))


@router.get("/verifications", responses=problems(404))
def list_verifications(run_id: str, name: str, catalog: CatalogDep) -> Listing[VerificationResource]:
    """List the newest verifications of an average, newest first."""
    catalog.wanted(run_id, name)
    found = catalog.newest_jobs(Verifications(catalog.store, run_id, name))
    return Listing(data=[verification_resource(one) for one in found])


@router.get("/verifications/{verification_id}", responses=problems(404))
def show_verification(run_id: str, name: str, verification_id: str, catalog: CatalogDep) -> VerificationResource:
    """Show a verification: how far it is, and whether every bit agrees once it is done."""
    catalog.wanted(run_id, name)
    return verification_resource(Verifications(catalog.store, run_id, name).fetch(verification_id))
