"""Fills templates and answers with them.

Everything is escaped, and a forgotten value is an error. Templates hold no script and no style of their own, since
the answer's headers (`services.api.access.headers`) let the browser load nothing but this service's files.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import Response

from services.api.dashboard import numbers
from services.api.dashboard.events import describe

if TYPE_CHECKING:
    from starlette.requests import Request

_TEMPLATES = Path(__file__).with_name("templates")

_HEADERS = {"Cache-Control": "private, no-store"}


def page(
    template: str,
    *,
    request: Request,
    status: int = 200,
    headers: dict[str, str] | None = None,
    **values: Any,  # noqa: ANN401  what a template takes
) -> Response:
    """The answer with a filled template in it."""
    signed_in = not request.app.state.tokens.is_open
    body = _environment().get_template(template).render(**values, signed_in=signed_in)
    return Response(body, status, _HEADERS | (headers or {}), "text/html; charset=utf-8")


def is_page_wanted(request: Request) -> bool:
    """Whether a browser asks, for a page or for a part of one, and not a program for data."""
    return "text/html" in request.headers.get("accept", "") or is_part_wanted(request)


def is_part_wanted(request: Request) -> bool:
    """Whether htmx asks, which replaces a part of the page."""
    return request.headers.get("hx-request") == "true"


def digest(*values: object) -> str:
    """A short name for what is shown, by which the next request can tell that nothing has changed."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {}  # in the order given, not sorted
    environment.filters.update(
        number=numbers.number,
        signed=numbers.signed,
        metric=numbers.metric,
        percent=numbers.percent,
        count=numbers.count,
        size=numbers.size,
        duration=numbers.duration,
        clock_time=numbers.clock_time,
        describe=describe,
    )
    return environment
