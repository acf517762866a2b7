"""The predictor's HTTP: one route that predicts, and the probes. It trusts whoever sends its token: the API.

It knows HTTP and what is found and asked elsewhere (`published`, `engines`). The invariant: every refusal is a
`Refusal` with a stable code; what nobody foresaw gives nothing away.
"""

from __future__ import annotations

import asyncio
import hmac
from typing import TYPE_CHECKING

import structlog
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from services.runtime.prediction import (
    PREDICT_PATH,
    RETRY_AFTER_S,
    PredictionAnswer,
    PredictionJob,
    PredictionRefusedError,
    Refusal,
)
from wa_core.errors import (
    InvalidInputError,
    NotFoundError,
    StoreAuthError,
    TransientError,
    WeightAveragingError,
)

if TYPE_CHECKING:
    from concurrent.futures import Future

    from starlette.requests import Request

    from services.predictor.engines import Engines
    from services.predictor.protocol import Outcome
    from services.predictor.published import ModelFiles, Published, Target

log = structlog.get_logger(__name__)

MAX_BODY_BYTES = 4 << 20  # the API takes 1 MiB
PATIENCE_S = 60.0
_UNAVAILABLE = 503


class Predictions:
    """Answers requests.

    Args:
        published: finds generations.
        files: weights on disk.
        engines: the processes that hold models.
        token: what callers must send; None lets everybody in who reaches this.
    """

    def __init__(
        self, published: Published, files: ModelFiles, engines: Engines, *, token: str | None = None
    ) -> None:
        self._published = published
        self._files = files
        self._engines = engines
        self._token = token

    async def predict(self, request: Request) -> Response:
        """Answer a `PredictionJob`."""
        if not self._is_known(request.headers.get("authorization", "")):
            return _refused(Refusal(code="auth_invalid", message="the token is not this predictor's"), status=401)
        try:
            job = PredictionJob.model_validate_json(await _body(request))
        except ValidationError as error:
            refusal = Refusal(code="invalid_request", message=error.errors(include_url=False)[0]["msg"])
            return _refused(refusal, status=422)
        try:
            return await self._answer(job)
        except PredictionRefusedError as error:
            return _refused(error.refusal, status=error.status)
        except (WeightAveragingError, OSError) as error:
            return _trouble(error)

    async def _answer(self, job: PredictionJob) -> Response:
        target = await run_in_threadpool(self._published.find, job.run_id, job.average, job.generation)
        waiting = await run_in_threadpool(self._begin, target, job)
        try:
            outcome = await asyncio.wait_for(asyncio.wrap_future(waiting), PATIENCE_S)
        except TimeoutError:
            message = f"no answer within {PATIENCE_S:g} s, because of what else is asked; try again"
            raise PredictionRefusedError(message, code="predictor_busy") from None
        if outcome.refusal is not None:
            found = outcome.refusal
            raise PredictionRefusedError(found.message, code=found.code, faults=found.faults)
        answer = PredictionAnswer(
            predictions=outcome.predictions,
            run_id=target.run_id,
            average=target.average,
            generation=target.generation,
            sha256=target.file.sha256,
        )
        return Response(answer.model_dump_json(), media_type="application/json")

    def _begin(self, target: Target, job: PredictionJob) -> Future[Outcome]:
        engine = self._engines.engine_for(target)
        engine.check(target)
        self._files.path_of(target.file)  # here, so that nobody who asks another model waits for the download
        return engine.submit(target, job.instances)

    def _is_known(self, header: str) -> bool:
        return self._token is None or hmac.compare_digest(header.encode(), f"Bearer {self._token}".encode())


def create_app(predictions: Predictions) -> Starlette:
    """The application."""
    return Starlette(
        routes=[
            Route(PREDICT_PATH, predictions.predict, methods=["POST"]),
            Route("/livez", _say_ok),
            Route("/readyz", _say_ok),
        ]
    )


async def _say_ok(_request: Request) -> Response:
    # Models are loaded when they are asked for: a process that listens is ready.
    return JSONResponse({"status": "ok"})


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return b""  # which is no job
    return bytes(body)


def _trouble(error: WeightAveragingError | OSError) -> Response:
    if isinstance(error, NotFoundError | InvalidInputError):
        return _refused(Refusal(code=error.code, message=error.message), status=404)
    if isinstance(error, TransientError | StoreAuthError):
        return _refused(Refusal(code="storage_unavailable", message=error.message), status=_UNAVAILABLE)
    log.error("prediction_failed", error=str(error))
    refusal = Refusal(code="prediction_failed", message="these weights cannot be loaded; see the predictor's log")
    return _refused(refusal, status=502)


def _refused(refusal: Refusal, *, status: int) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == _UNAVAILABLE else None
    return Response(refusal.model_dump_json(), status_code=status, headers=headers, media_type="application/json")
