"""Who may call what: every route needs the bearer token unless it is marked public.

The check is a dependency of the whole application, so a new route is closed until somebody opens it. It never
looks at paths: prefix checks are how routes get forgotten.
"""

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from services.api.problems import HttpProblem
from wa_core.records import DEFAULT_OWNER

F = TypeVar("F", bound=Callable[..., Any])

_PUBLIC: set[Callable[..., Any]] = set()
_READING = frozenset({"GET", "HEAD", "OPTIONS"})

_bearer = HTTPBearer(auto_error=False, description="the token that the service was started with (WA_TOKEN)")


@dataclass(frozen=True, slots=True)
class Tokens:
    """What callers may send. With none of them, everybody is let in.

    `full` opens everything, `read` only looks. Those in `named` (owner -> token) open everything as well, and say
    whose the runs are that are submitted.
    """

    full: str | None = None
    read: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether no token is wanted."""
        return self.full is None and self.read is None and not self.named


def public(endpoint: F) -> F:
    """Open a route to callers without a token. Goes below the route decorator."""
    _PUBLIC.add(endpoint)
    return endpoint


def require_token(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> None:
    """Refuse a caller without the right token, when the service has one.

    Raises:
        HttpProblem: 401 ``auth_missing`` or ``auth_invalid``; 403 ``scope_missing`` to a token that only reads.
    """
    tokens: Tokens = request.app.state.tokens
    if tokens.is_open or request.scope.get("endpoint") in _PUBLIC:
        return
    if credentials is None:
        raise HttpProblem(
            "this service wants a token and the request has none",
            status=401,
            code="auth_missing",
            headers={"WWW-Authenticate": "Bearer"},
        )
    owner = next((name for name, token in tokens.named.items() if _is_same(credentials.credentials, token)), None)
    if owner is not None or _is_same(credentials.credentials, tokens.full):
        request.state.owner = owner or DEFAULT_OWNER
        return
    if not _is_same(credentials.credentials, tokens.read):
        raise HttpProblem(
            "the request's token is not this service's",
            status=401,
            code="auth_invalid",
            headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
        )
    if request.method not in _READING:
        raise HttpProblem(
            f"this token may only read, and {request.method} changes something",
            status=403,
            code="scope_missing",
            headers={"WWW-Authenticate": 'Bearer error="insufficient_scope", scope="runs:write"'},
        )


def owner_of(request: Request) -> str:
    """Whose the runs are that this request submits."""
    owner: str = getattr(request.state, "owner", DEFAULT_OWNER)
    return owner


def _is_same(sent: str, expected: str | None) -> bool:
    return expected is not None and hmac.compare_digest(sent.encode(), expected.encode())
