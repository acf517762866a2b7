"""The API's way to the predictor, which holds the models: one question, one answer, trouble as a problem.

It knows HTTP; no bucket and no model. The invariant: whatever the predictor does or does not, the caller gets an
answer, in time, that says what to do.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

import httpx2
from pydantic import ValidationError

from services.api.problems import HttpProblem
from services.runtime.prediction import PREDICT_PATH, RETRY_AFTER_S, STATUSES, PredictionAnswer, Refusal

if TYPE_CHECKING:
    from services.runtime.prediction import PredictionJob

_CONNECT_TIMEOUT_S = 2.0
_ANSWER_TIMEOUT_S = 110.0  # the predictor gives up before that
_MAX_CONNECTIONS = 100
_NO_PREDICTOR = (
    "this service has no predictor; start one with `python -m services.predictor` on the same bucket, and name it "
    "to the API in WA_PREDICTOR_URL (`wa up` and Docker Compose do both)"
)


class Predictor:
    """The predictor at `url`; None where there is none.

    Args:
        url: such as ``http://127.0.0.1:8002``.
        token: what it wants to see.
    """

    def __init__(self, url: str | None, *, token: str | None = None) -> None:
        self._url = url
        self._http = None if url is None else _client(token)

    async def close(self) -> None:
        """Give back the connections."""
        if self._http is not None:
            await self._http.aclose()

    async def predict(self, job: PredictionJob) -> PredictionAnswer:
        """Ask.

        Raises:
            HttpProblem: 422 ``invalid_instances``; 501 ``prediction_not_supported`` or ``model_too_large``; 502
                ``prediction_failed``; 503 ``predictor_unavailable`` or ``predictor_busy``; 504
                ``prediction_timeout``.
        """
        if self._url is None or self._http is None:
            raise _unavailable(_NO_PREDICTOR)
        try:
            response = await self._http.post(
                f"{self._url.rstrip('/')}{PREDICT_PATH}",
                content=job.model_dump_json(),
                headers={"Content-Type": "application/json"},
            )
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            name = type(error).__name__
            raise _unavailable(f"the predictor does not answer ({name}); it may be starting, try again") from None
        try:
            if response.status_code == HTTPStatus.OK:
                return PredictionAnswer.model_validate_json(response.content)
            refusal = Refusal.model_validate_json(response.content)
        except ValidationError:
            raise _unavailable(f"what answers as the predictor is none (it said {response.status_code})") from None
        raise _problem(refusal, status=response.status_code)


def _problem(refusal: Refusal, *, status: int) -> HttpProblem:
    if status == HTTPStatus.UNAUTHORIZED:
        return _unavailable("the predictor does not know this API's token; set WA_PREDICTOR_TOKEN alike for both")
    is_ours = refusal.code in STATUSES or status == HTTPStatus.NOT_FOUND
    status = STATUSES.get(refusal.code, status) if is_ours else HTTPStatus.BAD_GATEWAY
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == HTTPStatus.SERVICE_UNAVAILABLE else None
    faults = [(fault.pointer, fault.message) for fault in refusal.faults]
    return HttpProblem(refusal.message, status=status, code=refusal.code, faults=faults, headers=headers)


def _client(token: str | None) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        headers={"Authorization": f"Bearer {token}"} if token else {},
        timeout=httpx2.Timeout(_ANSWER_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
        limits=httpx2.Limits(max_connections=_MAX_CONNECTIONS),
        trust_env=False,  # it is a process of ours, not a place on the web
    )


def _unavailable(detail: str) -> HttpProblem:
    headers = {"Retry-After": str(RETRY_AFTER_S)}
    return HttpProblem(detail, status=503, code="predictor_unavailable", headers=headers)
