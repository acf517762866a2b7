"""Ask published averages: predictions, made by the predictor and not in this process."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool

from services.api.access.auth import MODELS, scope
from services.api.answers.predictions import Predictor  # noqa: TC001  as all that routes name
from services.api.asked.body import PredictionRequest, read_prediction
from services.api.asked.selection import select_file
from services.api.problems import HttpProblem
from services.api.routes.averages import SelectionDep
from services.api.routes.dependencies import CatalogDep, problems
from services.runtime.prediction import PredictionAnswer, PredictionJob
from wa_core.records import NO_RECIPE

router = APIRouter(prefix="/v1/runs/{run_id}/averages", tags=["averages"])


@router.post(
    "/{name}:predict",
    responses=problems(400, 404, 408, 409, 413, 415, 422, 501, 502, 504),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/PredictionRequest"}}},
        }
    },
)
@scope(MODELS)
async def predict(
    run_id: str,
    name: str,
    catalog: CatalogDep,
    chosen: SelectionDep,
    wanted: Annotated[PredictionRequest, Depends(read_prediction)],
    request: Request,
) -> PredictionAnswer:
    """Ask an average: its newest published weights, or those of the generation chosen, which the answer names."""
    served, _ = await run_in_threadpool(select_file, catalog, run_id, name, chosen, file="weights.safetensors")
    spec = await run_in_threadpool(catalog.spec, run_id)
    if spec.request.recipe == NO_RECIPE:
        raise HttpProblem(
            f"run {run_id} has no recipe, so nothing is known of what its model takes; register the run with a "
            f"recipe that has an Instance and predict(), see docs/guides/predict.md",
            status=501,
            code="prediction_not_supported",
        )
    predictor: Predictor = request.app.state.predictor
    job = PredictionJob(run_id=run_id, average=name, generation=served.generation, instances=wanted.instances)
    return await predictor.predict(job)
