"""The raw weights of a run to download: those of its checkpoints, as training left them."""

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from services.api.access.auth import MODELS, scope
from services.api.answers.weights import download_response
from services.api.routes.dependencies import FILE_ANSWERS, CatalogDep, Redirect
from services.api.state.catalog import Catalog
from wa_core import layout
from wa_core.catalog.history import lineage
from wa_core.errors import NotFoundError
from wa_core.records import CheckpointCommitted

router = APIRouter(prefix="/v1/runs/{run_id}/checkpoints", tags=["runs"])

_NEWEST = "latest"
Step = Annotated[str, Path(pattern="^(latest|[0-9]{1,12})$", description="a step, or latest")]


@router.head("/{step}/weights.safetensors", include_in_schema=False)
@router.get("/{step}/weights.safetensors", response_class=Response, responses=FILE_ANSWERS)
@scope(MODELS)
def download_raw(
    run_id: str, step: Step, request: Request, catalog: CatalogDep, *, redirect: Redirect = False
) -> Response:
    """Download a checkpoint's raw weights as safetensors. Ranges, If-Range and digests work."""
    checkpoint = _chosen(catalog, run_id, step)
    ref = checkpoint.files.get(layout.MODEL_FILE)
    if ref is None:
        raise NotFoundError(
            f"the checkpoint of step {checkpoint.step} has no weights in one file", code="file_not_found"
        )
    filename = f"{run_id}-{checkpoint.step}.raw.safetensors"
    return download_response(request, catalog.store, ref, filename=filename, redirect=redirect)


def _chosen(catalog: Catalog, run_id: str, step: str) -> CheckpointCommitted:
    """The newest surviving checkpoint, or that of a step."""
    there = lineage(catalog.entries(run_id))
    found = there[-1:] if step == _NEWEST else [one for one in there if one.step == int(step)]
    if found:
        return found[0]
    wanted = f" of step {int(step)}; its newest is of step {there[-1].step}" if there else " yet"
    raise NotFoundError(f"run {run_id} has no checkpoint{wanted}", code="checkpoint_not_found")
