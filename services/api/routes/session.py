"""Sign a browser in and out. For the page: programs send their token with every request."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from services.api.access.auth import count_request, find_caller, public
from services.api.access.session import begin_session, check_same_origin, end_session
from services.api.asked.body import read_form
from services.api.dashboard.refusals import PageRoute
from services.api.problems import HttpProblem

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.post("/session")
@public
async def sign_in(form: Annotated[dict[str, str], Depends(read_form)], request: Request) -> Response:
    """Take the form's field `token`, and let the browser send it from now on."""
    check_same_origin(request, must_say=False)
    token = form.get("token", "").strip()
    caller = await find_caller(request, token)
    await count_request(request, caller)
    if caller is None:
        raise HttpProblem("this is none of the service's tokens", status=401, code="auth_invalid")
    answer = _to_start()
    if not request.app.state.tokens.is_open:
        begin_session(request, answer, token)
    return answer


@router.post("/session:end")
@public
async def sign_out(request: Request) -> Response:
    """Let the browser forget the token, and show it the start."""
    check_same_origin(request, must_say=False)
    answer = _to_start()
    end_session(request, answer)
    return answer


@router.delete("/session")
@public
async def end(request: Request) -> Response:
    """Let the browser forget the token."""
    check_same_origin(request, must_say=False)
    answer = Response(status_code=204, headers={"Cache-Control": "no-store"})
    end_session(request, answer)
    return answer


def _to_start() -> Response:
    return Response(status_code=303, headers={"Location": "/", "Cache-Control": "no-store"})
