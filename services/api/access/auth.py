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

from services.api.access.rates import REQUESTS
from services.api.access.session import check_same_origin, token_in_cookie
from services.api.problems import HttpProblem
from wa_core.records import DEFAULT_OWNER

F = TypeVar("F", bound=Callable[..., Any])

READ, WRITE, CODE, MODELS, ADMIN = "runs:read", "runs:write", "runs:code", "models:read", "admin"

_PUBLIC: set[Callable[..., Any]] = set()
_SCOPES: dict[Callable[..., Any], str] = {}
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_ALL = frozenset({READ, WRITE, CODE, MODELS, ADMIN})
#: Who may read runs may read what came out of them.
_IMPLIED = {READ: frozenset({MODELS})}

_bearer = HTTPBearer(auto_error=False, description="WA_TOKEN, or a token made by `wa tokens create`")


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is, and what it may do."""

    owner: str
    scopes: frozenset[str]

    @classmethod
    def holding(cls, scopes: frozenset[str], *, owner: str = DEFAULT_OWNER) -> "Caller":
        """A caller with `scopes` and what they imply."""
        implied = (_IMPLIED.get(name, frozenset()) for name in scopes)
        return cls(owner, scopes.union(*implied))


EVERYBODY = Caller.holding(_ALL)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What callers may send: `full` opens everything, `write` all but code and tokens, `read` only looks.

    Those in `named` (owner -> token) open everything as well, and say whose the runs are that are submitted. With
    none of them, everybody is let in. Further tokens are in the bucket (`services.api.access.token_book`).
    """

    full: str | None = None
    write: str | None = None
    read: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_open(self) -> bool:
        """Whether no token is wanted."""
        return self.full is None and self.write is None and self.read is None and not self.named

    def caller_of(self, sent: str) -> Caller | None:
        """Who sends this token; None when it is none of these."""
        known = [
            *((token, Caller.holding(_ALL, owner=owner)) for owner, token in self.named.items()),
            (self.full, Caller.holding(_ALL)),
            (self.write, Caller.holding(frozenset({READ, WRITE}))),
            (self.read, Caller.holding(frozenset({READ}))),
        ]
        return next((caller for token, caller in known if _is_same(sent, token)), None)


def public(endpoint: F) -> F:
    """Open a route to callers without a token. Goes below the route decorator."""
    _PUBLIC.add(endpoint)
    return endpoint


def is_public(endpoint: Callable[..., Any] | None) -> bool:
    """Whether a route is open to callers without a token."""
    return endpoint in _PUBLIC


def scope(name: str) -> Callable[[F], F]:
    """Say which scope a route needs, where its method does not tell. Goes below the route decorator."""

    def mark(endpoint: F) -> F:
        _SCOPES[endpoint] = name
        return endpoint

    return mark


def scope_of(endpoint: Callable[..., Any] | None, method: str) -> str:
    """Which scope a route needs."""
    by_method = READ if method in _READING else WRITE
    return _SCOPES.get(endpoint, by_method) if endpoint else by_method


async def find_caller(request: Request, sent: str | None) -> Caller | None:
    """Who sends this token; None when it is not this service's, and everybody where none is wanted."""
    tokens: Tokens = request.app.state.tokens
    if tokens.is_open:
        return EVERYBODY
    if sent is None:
        return None
    return tokens.caller_of(sent) or await request.app.state.token_book.caller_of(sent)


async def is_signed_in(request: Request) -> bool:
    """Whether a public page's request comes with a session that still lets it read runs, or needs none."""
    caller = await find_caller(request, token_in_cookie(request))
    return caller is not None and READ in caller.scopes


async def require_token(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> None:
    """Refuse a caller without a token for the route, when the service has tokens.

    A bearer token counts before a session's cookie. What a cookie changes must be asked for by a page of ours.

    Raises:
        HttpProblem: 401 ``auth_missing`` or ``auth_invalid``; 403 ``scope_missing`` or ``cross_site``; 429
            ``rate_limited``.
    """
    endpoint = request.scope.get("endpoint")
    request.state.caller = EVERYBODY
    if is_public(endpoint):
        return
    sent = credentials.credentials if credentials else token_in_cookie(request)
    caller = await find_caller(request, sent)
    await count_request(request, caller)
    if caller is EVERYBODY:
        return
    if caller is None:
        raise _not_known(sent)
    if credentials is None and request.method not in _READING:
        check_same_origin(request)
    request.state.caller = caller
    require_scope(request, scope_of(endpoint, request.method))


def _not_known(sent: str | None) -> HttpProblem:
    """The refusal of who sends no token, or one that is not the service's."""
    if sent is None:
        return HttpProblem(
            "this service wants a token and the request has none",
            status=401,
            code="auth_missing",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return HttpProblem(
        "the request's token is not this service's, or it has expired or was revoked",
        status=401,
        code="auth_invalid",
        headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
    )


def require_scope(request: Request, name: str) -> None:
    """Refuse a caller whose token does not open `name`.

    Raises:
        HttpProblem: 403 ``scope_missing``.
    """
    if name not in request.state.caller.scopes:
        raise HttpProblem(
            _WITHOUT[name],
            status=403,
            code="scope_missing",
            headers={"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{name}"'},
        )


async def count_request(request: Request, caller: Caller | None) -> None:
    """Count the request for its caller, or for its address where nobody has a name.

    Raises:
        HttpProblem: 429 ``rate_limited``.
    """
    if caller is None or caller is EVERYBODY:
        who = request.client.host if request.client else ""
    else:
        who = caller.owner
    request.state.counted_as = who
    await request.app.state.rates.take(request, REQUESTS, who=who)


def owner_of(request: Request) -> str:
    """Whose the runs are that this request submits."""
    caller: Caller = request.state.caller
    return caller.owner


_WITHOUT = {
    READ: "this token may not read runs",
    WRITE: "this token may only read, and the request changes something",
    CODE: "this token may not send code to be run; ask for the service's full token",
    MODELS: "this token may not read models",
    ADMIN: "this token may not manage tokens",
}


def _is_same(sent: str, expected: str | None) -> bool:
    return expected is not None and hmac.compare_digest(sent.encode(), expected.encode())
