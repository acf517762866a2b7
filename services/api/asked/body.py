"""Reads submissions and additions strictly: bounded in size, time and depth, and JSON without its ambiguities.

Duplicate keys, NaN and integers without end are refused rather than guessed at, because two readers of the same
bytes must never see two different runs. Every refusal says where and what.
"""

import asyncio
import json
import math
from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, NoReturn, TypeVar
from urllib.parse import parse_qsl

from fastapi import Request
from pydantic import BaseModel, Field, JsonValue, StringConstraints, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect

from services.api.problems import MAX_FAULTS, HttpProblem
from services.recipes.registry import recipe_names
from services.runtime.prediction import MAX_INSTANCES
from wa_core.packages import MAX_PACKAGE_BYTES, TOO_LARGE
from wa_core.records import (
    AverageRequest,
    CheckpointPolicy,
    Deadlines,
    LandscapeRequest,
    Resumption,
    RunRequest,
    Scaling,
    TokenRequest,
    TrainingOptions,
    Webhook,
)
from wa_core.records import Request as BodyRequest

MAX_BODY_BYTES = 1 << 20
MAX_FORM_BYTES = 16 << 10
MAX_FORM_FIELDS = 16
PACKAGE_DEADLINE_S = 120.0
_ZIP_TYPES = ("application/zip", "application/x-zip-compressed", "application/octet-stream")
MAX_DEPTH = 64
MAX_INTEGER_DIGITS = 100
BODY_DEADLINE_S = 15.0
_MAX_SHOWN = 100  # characters of a caller's text that a refusal repeats

M = TypeVar("M", bound=BaseModel)

_PARTS: dict[str, type[BaseModel]] = {
    "scaling": Scaling,
    "checkpoint": CheckpointPolicy,
    "webhooks": Webhook,
    "averages": AverageRequest,
    "deadlines": Deadlines,
    "training": TrainingOptions,
}


class AverageAddition(AverageRequest):
    """The body of an addition: an average, and whether only to say what it would take."""

    dry_run: bool = False


class WantedRule(BodyRequest):
    """The body of a preview."""

    rule: Annotated[str, StringConstraints(min_length=1, max_length=200)]


class PredictionRequest(BodyRequest):
    """The body of a prediction, as in KServe's V1 protocol: what is asked, each as the run's recipe wants it."""

    instances: list[JsonValue] = Field(min_length=1, max_length=MAX_INSTANCES)


async def read_run_request(request: Request) -> RunRequest:
    """The submission in a request's body.

    Raises:
        HttpProblem: 400, 408, 413, 415 or 422; the code says why.
    """
    return parse_body(await _read_json(request), RunRequest)


async def read_addition(request: Request) -> AverageAddition:
    """The average to add that a request's body asks for.

    Raises:
        HttpProblem: as for `read_run_request`.
    """
    return parse_body(await _read_json(request), AverageAddition)


async def read_wanted_rule(request: Request) -> WantedRule:
    """The rule that a request's body asks about.

    Raises:
        HttpProblem: as for `read_run_request`.
    """
    return parse_body(await _read_json(request), WantedRule)


async def read_landscape_request(request: Request) -> LandscapeRequest:
    """The landscape that a request's body asks for.

    Raises:
        HttpProblem: as for `read_run_request`.
    """
    return parse_body(await _read_json(request), LandscapeRequest)


async def read_token_request(request: Request) -> TokenRequest:
    """The token that a request's body asks for.

    Raises:
        HttpProblem: as for `read_run_request`.
    """
    return parse_body(await _read_json(request), TokenRequest)


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a page's form; of one that comes twice, the last.

    Raises:
        HttpProblem: 400, 408, 413 or 415.
    """
    _check_type(request, ("application/x-www-form-urlencoded",))
    body = await _read(request, max_bytes=MAX_FORM_BYTES, deadline_s=BODY_DEADLINE_S, code="body_too_large")
    try:
        return dict(parse_qsl(body.decode(), max_num_fields=MAX_FORM_FIELDS))
    except ValueError as error:
        raise HttpProblem(f"the form cannot be read: {error}", status=400, code="body_not_a_form") from None


async def read_prediction(request: Request) -> PredictionRequest:
    """What a request's body asks an average.

    Raises:
        HttpProblem: as for `read_run_request`.
    """
    return parse_body(await _read_json(request), PredictionRequest)


async def read_resumption(request: Request) -> Resumption:
    """How a run is to go on, as a request's body asks for; one without a body asks for no change.

    Raises:
        HttpProblem: as for `read_run_request`.
    """
    body = await _read(request, max_bytes=MAX_BODY_BYTES, deadline_s=BODY_DEADLINE_S, code="body_too_large")
    if not body:
        return Resumption()
    _check_type(request, ("application/json",))
    return parse_body(body, Resumption)


async def read_package(request: Request) -> bytes:
    """The zip in a request's body; not looked into yet.

    Raises:
        HttpProblem: 400, 408, 413 or 415.
    """
    _check_type(request, _ZIP_TYPES)
    return await _read(request, max_bytes=MAX_PACKAGE_BYTES, deadline_s=PACKAGE_DEADLINE_S, code=TOO_LARGE)


async def _read_json(request: Request) -> bytes:
    _check_type(request, ("application/json",))
    return await _read(request, max_bytes=MAX_BODY_BYTES, deadline_s=BODY_DEADLINE_S, code="body_too_large")


def _check_type(request: Request, wanted: Sequence[str]) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in wanted:
        raise HttpProblem(
            f"the body's type is {content_type!r}; send Content-Type: {wanted[0]}",
            status=415,
            code="unsupported_media_type",
        )


def parse_body(body: bytes, model: type[M]) -> M:
    """A request's body, from its bytes.

    Raises:
        HttpProblem: 400 when they are no JSON, 422 when they are no `model`.
    """
    _check_json(body)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            raise _not_json(error.errors()[0]["msg"].removeprefix("Invalid JSON: ")) from None
        found = error.errors(include_url=False, include_context=False)[:MAX_FAULTS]
        faults = [_fault(details, model) for details in found]
    detail = "; ".join(f"{pointer}: {message}" if pointer else message for pointer, message in faults[:5])
    raise HttpProblem(detail, status=422, code="invalid_request", faults=faults)


async def _read(request: Request, *, max_bytes: int, deadline_s: float, code: str) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced[:19]) > max_bytes:
        _refuse_size(max_bytes, code)
    body = bytearray()
    try:
        async with asyncio.timeout(deadline_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    _refuse_size(max_bytes, code)
    except TimeoutError:
        detail = f"the body had not arrived whole after {deadline_s:.0f} s"
        raise HttpProblem(detail, status=408, code="body_too_slow", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise HttpProblem("the body ended early", status=400, code="body_incomplete") from None
    return bytes(body)


def _refuse_size(max_bytes: int, code: str) -> NoReturn:
    detail = f"the body is larger than {max_bytes} bytes"
    raise HttpProblem(detail, status=413, code=code, headers={"Connection": "close"})


def _check_json(body: bytes) -> None:
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        detail = f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}"
        raise HttpProblem(detail, status=400, code="body_not_utf8") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_number,
            parse_int=_bounded_integer,
            parse_float=_finite_float,
        )
    except json.JSONDecodeError as error:
        raise _not_json(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        _refuse_depth()
    _check_depth(value)


def _not_json(reason: str) -> HttpProblem:
    return HttpProblem(f"the body is not JSON: {reason}", status=400, code="body_not_json")


def _check_depth(value: object) -> None:
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list) for inner in _children(outer)]
        if not level:
            return
    _refuse_depth()


def _children(value: dict[str, object] | list[object]) -> list[object]:
    return list(value.values()) if isinstance(value, dict) else value


def _refuse_depth() -> NoReturn:
    raise HttpProblem(f"the body is nested deeper than {MAX_DEPTH} levels", status=400, code="body_too_deep")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise HttpProblem(
            f"the key {twice[:_MAX_SHOWN]!r} appears twice in one object",
            status=422,
            code="duplicate_key",
            faults=[(twice[:_MAX_SHOWN], "appears twice")],
        )
    return found


def _refuse_number(text: str) -> NoReturn:
    detail = f"{text[:40]} is not a finite JSON number; leave it out or write null"
    raise HttpProblem(detail, status=422, code="invalid_number")


def _finite_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _bounded_integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        detail = f"an integer has {len(digits)} digits; at most {MAX_INTEGER_DIGITS} are read"
        raise HttpProblem(detail, status=422, code="invalid_number")
    return int(digits)


def _fault(details: ErrorDetails, model: type[BaseModel]) -> tuple[str, str]:
    location = details["loc"]
    pointer = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part[:_MAX_SHOWN]}" for part in location
    ).lstrip(".")
    if details["type"] == "extra_forbidden":
        return pointer, _nearest(str(location[-1])[:_MAX_SHOWN], model=_PARTS.get(str(location[0]), model))
    if details["type"] == "string_pattern_mismatch":
        return pointer, f"{str(details['input'])[:_MAX_SHOWN]!r} is not allowed; {_form_of(pointer)}"
    return pointer, details["msg"].removeprefix("Value error, ")


def _form_of(pointer: str) -> str:
    if pointer == "recipe":
        return f"write package.module:ClassName; the recipes here are: {', '.join(recipe_names())}"
    if pointer == "package":
        return "write sha256: and 64 hexadecimal digits"
    return "write at most 63 lower-case letters, digits and hyphens, the first no hyphen"


def _nearest(name: str, *, model: type[BaseModel]) -> str:
    known = list(model.model_fields)
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown field; did you mean {near[0]!r}?" if near else f"unknown field; known are {', '.join(known)}"
