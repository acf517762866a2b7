"""Refusals as pages: what a browser gets where a program gets a problem document. The status is the same."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.responses import Response

from services.api.dashboard.rendering import is_page_wanted, is_part_wanted, page
from services.api.problems import HttpProblem, as_problem
from wa_core.errors import WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.requests import Request


class PageRoute(APIRoute):
    """A route whose refusals are pages too, for browsers."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler, which answers a browser's wrong request with a page."""
        handle = super().get_route_handler()

        async def handle_as_page(request: Request) -> Response:
            try:
                return await handle(request)
            except WeightAveragingError as error:
                if not is_page_wanted(request):
                    raise
                return _refusal(request, as_problem(error))
            except RequestValidationError:
                if not is_page_wanted(request):
                    raise
                problem = HttpProblem(
                    "the address asks for something that cannot be", status=422, code="invalid_request"
                )
                return _refusal(request, problem)

        return handle_as_page


def sign_in_page(request: Request, *, refused: HttpProblem | None = None) -> Response:
    """The page that asks for a token; for htmx, which wants a part of a page, word to load the whole."""
    headers = dict(refused.headers) if refused else {}
    status = refused.status if refused else HTTPStatus.OK.value
    if is_part_wanted(request):
        return Response(status_code=HTTPStatus.UNAUTHORIZED.value, headers=headers | {"HX-Refresh": "true"})
    is_wrong = refused is not None and refused.code == "auth_invalid"
    return page("login.html", request=request, status=status, headers=headers, is_wrong=is_wrong)


def _refusal(request: Request, problem: HttpProblem) -> Response:
    """The page for a refusal: the way in for those without a token, else what is wrong."""
    if problem.status == HTTPStatus.UNAUTHORIZED:
        return sign_in_page(request, refused=problem)
    return page("error.html", request=request, status=problem.status, headers=problem.headers, problem=problem)
