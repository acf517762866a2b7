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

from services.api.access.request_id import current_request_id
from wa_core import errors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fastapi import FastAPI, Request

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 2
MAX_FAULTS = 50  # that one answer lists; thousands more would only make it long
_HINT = "GET /openapi.json describes every request"

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
    "body_not_a_form": "send what the page's form sends",
    "headers_too_large": "send fewer and shorter headers, and a shorter query",
    "invalid_webhook": "give https addresses that are public, and events that there are",
    "no_recipe": "register the run with a recipe",
    "service_is_open": "start the service with WA_TOKEN, and make other tokens with that one",
    "too_slow": "try again after the seconds in Retry-After",
    "body_incomplete": "send the whole body; Content-Length says how much was announced",
    "body_not_json": "send JSON as RFC 8259 has it: double quotes, no trailing commas, no comments",
    "body_not_utf8": "encode the body as UTF-8",
    "body_too_deep": "nest objects and lists less deeply",
    "body_too_slow": "send the body at once; try again over a faster connection",
    "package_too_large": "leave data and weights out of the package; recipes read them from elsewhere",
    "unsupported_media_type": "set Content-Type to what the answer's detail names",
    "average_not_found": "GET /v1/runs/{run_id}/averages lists the run's averages",
    "checkpoint_not_found": "GET /v1/runs/{run_id}/checkpoints lists them; abandoned ones are not served",
    "file_not_found": "ask for one of the files that the detail names",
    "generation_not_found": "GET /v1/runs/{run_id}/averages/{name} names the newest generation",
    "landscape_not_found": "GET /v1/runs/{run_id}/averages/{name}/landscapes lists them",
    "object_not_found": "the file was removed by retention; ask for the newest one",
    "method_not_allowed": "use one of the methods in Allow",
    "already_finalizing": "wait for the run's end; its averages are being published",
    "already_finished": "submit a new run, or add an average to this one",
    "average_exists": "give the average another name",
    "being_cancelled": "submit a new run",
    "cannot_rebuild": "choose another rule, or keep more checkpoints next time (keep_last, keep_every_steps)",
    "conflict": "read the resource again, and decide anew",
    "no_evaluation": "ask for at=latest",
    "not_paused": "give from_step to go back to a step",
    "not_own_run": "give the run of a trainer of your own, or submit one",
    "still_pausing": "try again in a moment",
    "submission_in_progress": "send the same request again after the seconds in Retry-After",
    "too_many_averages": "submit another run for more averages",
    "content_changed": "ask again without If-Match for what there is now",
    "range_not_satisfiable": "Content-Range says how long the file is",
    "before_start": "choose a rule that counts a checkpoint which is kept",
    "duplicate_key": "write each key once",
    "idempotency_key_reused": "send a new key with a new submission",
    "invalid_config": "correct the fields of config that the detail names",
    "invalid_idempotency_key": "send 1 to 200 printable ASCII characters, such as a UUID",
    "invalid_input": "correct what the detail names",
    "invalid_number": "write a finite number of at most 100 digits, or null",
    "invalid_package": "send a zip of Python files with relative paths and no links",
    "invalid_request": "correct what `errors` points at",
    "needs_total_steps": "give the window in steps: last_steps=N",
    "no_such_step": "GET /v1/runs/{run_id}/checkpoints lists the steps",
    "not_a_lerp_rule": "choose swa, ema or power",
    "package_not_found": "POST /v1/packages takes the zip, and answers with its name",
    "recipe_not_allowed": "send your own code as a package, and name its module",
    "step_not_kept": "choose one of kept_steps, or 0 to begin anew",
    "unknown_recipe": "choose one of the recipes that the detail names",
    "degraded": "GET /readyz says which check fails; try again after the seconds in Retry-After",
    "internal": "tell an operator; the service's log has the reason under this time",
    "unsafe_store": "an operator must use a store with conditional writes; `wa doctor` names the failed check",
    "auth_missing": "send the header `Authorization: Bearer TOKEN`; `wa up` prints the token",
    "auth_invalid": "check WA_TOKEN; `wa up` prints the token of the service it started",
    "scope_missing": "use a token with the scope that WWW-Authenticate names, or WA_TOKEN",
    "cross_site": "send the token as `Authorization: Bearer TOKEN`; cookies are for the service's own page",
    "unknown_host": "call the service by a name that it knows, or add this one to its WA_ALLOWED_HOSTS",
    "quota_exceeded": "wait until a run has started, or cancel one that waits",
    "rate_limited": "try again after the seconds in Retry-After; RateLimit says how much is left",
    "token_not_found": "GET /v1/tokens lists the tokens",
    "run_not_found": "GET /v1/runs lists the runs",
    "route_not_found": "GET /openapi.json describes every route",
    "storage_unavailable": "nothing is lost; try again after the seconds in Retry-After",
    "storage_auth": "an operator must correct the store's credentials (WA_S3_ACCESS_KEY, WA_S3_SECRET_KEY)",
    "no_average_yet": "try again once a checkpoint has been folded and assessed",
    "body_too_large": "put large things into the bucket, not into the submission",
    "webhooks_off": "submit without `webhooks`, and ask with GET /v1/runs/{id}?wait=30 instead",
    "invalid_instances": "send instances as the recipe's Instance has them",
    "model_too_large": "download the weights, and predict with them elsewhere",
    "prediction_failed": "download the weights, and see what the recipe's predict() makes of them",
    "prediction_timeout": "send fewer instances at a time",
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


def problem_document(problem: HttpProblem) -> dict[str, Any]:
    """A problem as JSON."""
    document: dict[str, Any] = {
        "type": f"urn:wa:problem:{problem.code}",
        "title": HTTPStatus(problem.status).phrase,
        "status": problem.status,
        "detail": problem.message,
        "code": problem.code,
    }
    document["hint"] = _HINTS.get(problem.code, _HINT)
    if request_id := current_request_id():
        document |= {"instance": f"urn:wa:request:{request_id}", "request_id": request_id}
    document["errors"] = [{"pointer": pointer, "message": message} for pointer, message in problem.faults]
    return document | problem.extra


def problem_response(problem: HttpProblem) -> Response:
    """The answer for a problem."""
    # Escaped to ASCII: a detail may quote input that has no UTF-8 form, such as a lone surrogate.
    body = json.dumps(problem_document(problem), ensure_ascii=True).encode()
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
    found = error.errors()[:MAX_FAULTS]
    faults = [(".".join(str(part) for part in fault["loc"]), str(fault["msg"])) for fault in found]
    detail = "; ".join(f"{pointer}: {message}" for pointer, message in faults)
    return problem_response(HttpProblem(detail, status=422, code="invalid_request", faults=faults))
