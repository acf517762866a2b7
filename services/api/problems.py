"""The one place where an error becomes an HTTP answer: ``application/problem+json`` (RFC 9457).

Every refusal, whoever made it (the catalogue, the framework, this API), leaves here with a status, a stable code
and a text for people. What nobody foresaw becomes a 500 that gives nothing away.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from wa_core import errors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastapi import FastAPI, Request

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 2

_STATUS: dict[type[errors.WeightAveragingError], int] = {
    errors.NotFoundError: 404,
    errors.ConflictError: 409,
    errors.InvalidInputError: 422,
    errors.TransientError: 503,
    errors.StoreAuthError: 503,
    errors.UnsafeStoreError: 503,
}
_FRAMEWORK_CODES = {404: "route_not_found", 405: "method_not_allowed", 413: "body_too_large"}
_CODES = {"store_unavailable": "storage_unavailable", "transient": "storage_unavailable"}
_HINTS = {
    "auth_missing": "send the header `Authorization: Bearer TOKEN`; `wa up` prints the token",
    "auth_invalid": "check WA_TOKEN; `wa up` prints the token of the service it started",
    "scope_missing": "use the service's full token (WA_TOKEN)",
    "run_not_found": "GET /v1/runs lists the runs",
    "route_not_found": "GET /openapi.json describes every route",
    "storage_unavailable": "nothing is lost; try again after the seconds in Retry-After",
    "storage_auth": "an operator must correct the store's credentials (WA_S3_ACCESS_KEY, WA_S3_SECRET_KEY)",
    "no_average_yet": "try again once a checkpoint has been folded and assessed",
    "body_too_large": "put large things into the bucket, not into the submission",
    "prediction_not_supported": "download the weights, or give the recipe an Instance and predict()",
    "predictor_busy": "try again after the seconds in Retry-After",
    "predictor_unavailable": "try again after the seconds in Retry-After; an operator starts the predictor",
    "invalid_rule": "write for example swa:start_step=100 or ema:half_life=60",
}


class HttpProblem(errors.WeightAveragingError):
    """A refusal that only HTTP knows, with its status.

    Args:
        detail: what happened, with the values.
        status: the HTTP status.
        code: the stable code.
        faults: (pointer, message) of every fault found.
        headers: to send along.
        extra: further members of the problem document.
    """

    kind = "http"

    def __init__(
        self,
        detail: str,
        *,
        status: int,
        code: str,
        faults: Sequence[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail, code=code)
        self.status = status
        self.faults = faults
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})


def install(app: FastAPI) -> None:
    """Let every error that a route raises leave as a problem."""
    app.add_exception_handler(errors.WeightAveragingError, _on_error)
    app.add_exception_handler(HTTPException, _on_framework)
    app.add_exception_handler(RequestValidationError, _on_validation)


def problem_response(problem: HttpProblem) -> Response:
    """The answer for a problem."""
    document: dict[str, Any] = {
        "type": f"urn:wa:problem:{problem.code}",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.message,
        "code": problem.code,
    }
    if hint := _HINTS.get(problem.code):
        document["hint"] = hint
    document["errors"] = [{"pointer": pointer, "message": message} for pointer, message in problem.faults]
    # Escaped to ASCII: a detail may quote input that has no UTF-8 form, such as a lone surrogate.
    body = json.dumps(document | problem.extra, ensure_ascii=True).encode()
    return Response(body, status_code=problem.status, headers=problem.headers, media_type=MEDIA_TYPE)


def unforeseen() -> HttpProblem:
    """What a caller hears about an error that nobody foresaw."""
    return HttpProblem("something went wrong inside the service; its log says what", status=500, code="internal")


def as_problem(error: errors.WeightAveragingError) -> HttpProblem:
    """The HTTP form of an error."""
    if isinstance(error, HttpProblem):
        return error
    status = next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), 500)
    if status == HTTPStatus.INTERNAL_SERVER_ERROR:
        return unforeseen()
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == HTTPStatus.SERVICE_UNAVAILABLE else None
    code = _CODES.get(error.code, error.code)
    return HttpProblem(error.message, status=status, code=code, headers=headers)


async def _on_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.WeightAveragingError)  # noqa: S101  registered for just these
    return problem_response(as_problem(error))


async def _on_framework(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101  registered for just these
    code = _FRAMEWORK_CODES.get(error.status_code, f"http_{error.status_code}")
    headers = dict(error.headers or {})
    detail = f"{request.method} {request.url.path[:200]}: {error.detail}"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(request.app.state.methods_at(request.url.path))
        detail = f"{request.url.path[:200]} takes {headers['Allow']}, not {request.method}"
    if error.status_code == HTTPStatus.NOT_FOUND:
        detail = f"there is nothing at {request.url.path[:200]}"
    return problem_response(HttpProblem(detail, status=error.status_code, code=code, headers=headers))


async def _on_validation(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101  registered for just these
    faults = [(".".join(str(part) for part in fault["loc"]), str(fault["msg"])) for fault in error.errors()]
    detail = "; ".join(f"{pointer}: {message}" for pointer, message in faults)
    return problem_response(HttpProblem(detail, status=422, code="invalid_request", faults=faults))
