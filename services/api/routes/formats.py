"""What goes with published weights, and them in a folder: model card, config, coefficients, provenance."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from starlette.responses import StreamingResponse

from services.api.access.auth import MODELS, scope
from services.api.answers import model_card
from services.api.answers.provenance import PublishedAverage, statement
from services.api.answers.weights import sent_in_threads
from services.api.answers.zipped import zip_stream
from services.api.asked.selection import select_file
from services.api.routes.averages import SelectionDep
from services.api.routes.dependencies import CatalogDep, problems
from services.api.routes.service import VERSION
from services.api.schemas import Coefficients
from wa_core import layout

router = APIRouter(prefix="/v1/runs/{run_id}/averages/{name}", tags=["formats"])

_WEIGHTS = "weights.safetensors"
_ANSWERS = problems(404, 409, 422)


def _answers(media_type: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"description": "as asked", "content": {media_type: {}}}, **_ANSWERS}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which published weights a request is about."""

    run_id: str
    name: str
    catalog: CatalogDep
    chosen: SelectionDep

    def published(self) -> PublishedAverage:
        """What is known of them.

        Raises:
            HttpProblem: 409 ``no_average_yet``.
            NotFoundError: there are none such.
        """
        served, _ = select_file(self.catalog, self.run_id, self.name, self.chosen, file=_WEIGHTS)
        return PublishedAverage(
            spec=self.catalog.spec(self.run_id),
            manifest=self.catalog.generation(self.run_id, self.name, served.generation),
            served=served,
            entries=self.catalog.entries(self.run_id),
        )


WantedDep = Annotated[Wanted, Depends()]


@router.get("/model-card", response_class=Response, responses=_answers("text/markdown"))
@scope(MODELS)
def show_model_card(wanted: WantedDep) -> Response:
    """Describe published weights, as the model card of a Hugging Face folder: Markdown with YAML front matter."""
    return Response(model_card.card(wanted.published()), media_type="text/markdown")


@router.get("/config.json", responses=_ANSWERS)
@scope(MODELS)
def show_config(wanted: WantedDep) -> dict[str, Any]:
    """Say what it takes to build the model that the weights are of."""
    return model_card.config(wanted.published())


@router.get("/coefficients", responses=_ANSWERS)
@scope(MODELS)
def show_coefficients(wanted: WantedDep) -> Coefficients:
    """List the checkpoints in published weights, each with its coefficient and digest."""
    published = wanted.published()
    manifest = published.manifest
    return Coefficients(
        run_id=wanted.run_id,
        average=manifest.name,
        generation=manifest.generation,
        rule=manifest.rule,
        sha256=published.sha256,
        data=published.coefficients(),
    )


@router.get("/provenance", responses=_ANSWERS)
@scope(MODELS)
def show_provenance(wanted: WantedDep) -> dict[str, Any]:
    """Say what published weights were made of and how: an in-toto statement with SLSA's predicate, unsigned."""
    return statement(wanted.published(), version=VERSION)


@router.get("/huggingface.zip", response_class=Response, responses=_answers("application/zip"))
@scope(MODELS)
def download_folder(wanted: WantedDep, request: Request) -> Response:
    """Download a Hugging Face folder: `model.safetensors`, `config.json` and the model card, in a zip."""
    published = wanted.published()
    ref = published.served.files[layout.MODEL_FILE]
    small = {
        "README.md": model_card.card(published).encode(),
        "config.json": json.dumps(model_card.config(published), indent=2).encode(),
    }
    chunks = wanted.catalog.store.stream(ref.key)
    body = zip_stream(small, name=layout.MODEL_FILE, size_bytes=ref.size_bytes, chunks=chunks)
    headers = {
        "Content-Disposition": f'attachment; filename="{published.stem}.zip"',
        "Cache-Control": "private, no-cache",
    }
    threads = request.app.state.download_threads
    return StreamingResponse(sent_in_threads(body, threads), media_type="application/zip", headers=headers)
