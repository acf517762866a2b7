"""Who may call what: every route needs the bearer token unless it is marked public.

The check is a dependency of the whole application, so a new route is closed until somebody opens it. It never
looks at paths: prefix checks are how routes get forgotten.
"""

import hmac
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from services.api.problems import HttpProblem

F = TypeVar("F", bound=Callable[..., Any])

_PUBLIC: set[Callable[..., Any]] = set()

_bearer = HTTPBearer(auto_error=False, description="the token that the service was started with (WA_TOKEN)")


def public(endpoint: F) -> F:
    """Open a route to callers without a token. Goes below the route decorator."""
    _PUBLIC.add(endpoint)
    return endpoint


def require_token(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> None:
    """Refuse a caller without the right token, when the service has one.

    Raises:
        HttpProblem: 401 ``auth_missing`` or ``auth_invalid``.
    """
    expected: str | None = request.app.state.token
    if expected is None or request.scope.get("endpoint") in _PUBLIC:
        return
    if credentials is None:
        raise HttpProblem(
            "this service wants a token and the request has none",
            status=401,
            code="auth_missing",
            headers={"WWW-Authenticate": "Bearer"},
        )
    if not hmac.compare_digest(credentials.credentials.encode(), expected.encode()):
        raise HttpProblem(
            "the request's token is not this service's",
            status=401,
            code="auth_invalid",
            headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
        )
