"""Who may call what: every route needs a token with the scope for it, unless the route is marked public.

The check is a dependency of the whole application, so a new route is closed until somebody opens it. It never
looks at paths: prefix checks are how routes get forgotten. Sending code to be run is a scope of its own.
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

READ, WRITE, CODE = "runs:read", "runs:write", "runs:code"

_PUBLIC: set[Callable[..., Any]] = set()
_SCOPES: dict[Callable[..., Any], str] = {}
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_ALL = frozenset({READ, WRITE, CODE})

_bearer = HTTPBearer(auto_error=False, description="the token that the service was started with (WA_TOKEN)")


@dataclass(frozen=True, slots=True)
class Tokens:
    """What callers may send: `full` opens everything, `write` all but sending code, `read` only looks.

    Those in `named` (owner -> token) open everything as well, and say whose the runs are that are submitted. With
    none of them, everybody is let in.
    """

    full: str | None = None
    write: str | None = None
    read: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether no token is wanted."""
        return self.full is None and self.write is None and self.read is None and not self.named

    def scopes_of(self, sent: str) -> frozenset[str]:
        """What a token opens; nothing when it is none of these."""
        known = ((self.full, _ALL), (self.write, frozenset({READ, WRITE})), (self.read, frozenset({READ})))
        if self.owner_of(sent) is not None:
            return _ALL
        return next((scopes for token, scopes in known if _is_same(sent, token)), frozenset())

    def owner_of(self, sent: str) -> str | None:
        """Whose token it is, if it has a name."""
        return next((owner for owner, token in self.named.items() if _is_same(sent, token)), None)


def public(endpoint: F) -> F:
    """Open a route to callers without a token. Goes below the route decorator."""
    _PUBLIC.add(endpoint)
    return endpoint


def scope(name: str) -> Callable[[F], F]:
    """Say which scope a route needs, where its method does not tell. Goes below the route decorator."""

    def mark(endpoint: F) -> F:
        _SCOPES[endpoint] = name
        return endpoint

    return mark


async def require_token(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> None:
    """Refuse a caller without a token for the route, when the service has tokens.

    Raises:
        HttpProblem: 401 ``auth_missing`` or ``auth_invalid``; 403 ``scope_missing``.
    """
    tokens: Tokens = request.app.state.tokens
    endpoint = request.scope.get("endpoint")
    if tokens.is_open or endpoint in _PUBLIC:
        request.state.scopes = _ALL
        return
    if credentials is None:
        raise HttpProblem(
            "this service wants a token and the request has none",
            status=401,
            code="auth_missing",
            headers={"WWW-Authenticate": "Bearer"},
        )
    request.state.owner = tokens.owner_of(credentials.credentials) or DEFAULT_OWNER
    request.state.scopes = tokens.scopes_of(credentials.credentials)
    if not request.state.scopes:
        raise HttpProblem(
            "the request's token is not this service's",
            status=401,
            code="auth_invalid",
            headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
        )
    by_method = READ if request.method in _READING else WRITE
    require_scope(request, _SCOPES.get(endpoint, by_method) if endpoint else by_method)


def require_scope(request: Request, name: str) -> None:
    """Refuse a caller whose token does not open `name`.

    Raises:
        HttpProblem: 403 ``scope_missing``.
    """
    if name not in request.state.scopes:
        raise HttpProblem(
            _WITHOUT[name],
            status=403,
            code="scope_missing",
            headers={"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{name}"'},
        )


def owner_of(request: Request) -> str:
    """Whose the runs are that this request submits."""
    owner: str = getattr(request.state, "owner", DEFAULT_OWNER)
    return owner


_WITHOUT = {
    READ: "this token may not read",
    WRITE: "this token may only read, and the request changes something",
    CODE: "this token may not send code to be run; ask for the service's full token",
}


def _is_same(sent: str, expected: str | None) -> bool:
    return expected is not None and hmac.compare_digest(sent.encode(), expected.encode())
