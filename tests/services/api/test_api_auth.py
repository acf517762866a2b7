from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.routing import Mount

from services.api.access.auth import scope_of
from services.api.app import create_app
from support.api import TOKEN
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from starlette.routing import BaseRoute

PUBLIC = {"/livez", "/readyz", "/version", "/metrics", "/", "/session", "/session:end"}
#: What is served without the application's dependencies; nothing in it may be anybody's.
MOUNTED = {"/static"}


def walk(routes: Iterable[BaseRoute]) -> Iterator[BaseRoute]:
    """All routes, those of included routers among them."""
    for route in routes:
        inner = getattr(route, "original_router", None)
        yield from walk(inner.routes) if inner is not None else [route]


ALL = list(walk(create_app(store=MemoryStore()).routes))
ROUTES = [
    (method, route.path, scope_of(route.endpoint, method))
    for route in ALL
    if isinstance(route, APIRoute)
    for method in sorted(route.methods)
]
CLOSED = [route for route in ROUTES if route[1] not in PUBLIC]


@pytest.fixture
def guarded(store: MemoryStore) -> Iterator[TestClient]:
    """The API with a token."""
    with TestClient(create_app(store=store, token=TOKEN)) as client:
        yield client


def test_the_walk_sees_everything() -> None:
    """Whatever is added to the application is a route that these tests call, or a folder known to be public."""
    others = [route for route in ALL if not isinstance(route, APIRoute)]

    assert len(ROUTES) > 20
    assert {path for _, path, _ in ROUTES} >= PUBLIC
    assert all(isinstance(route, Mount) and route.path in MOUNTED for route in others)


@pytest.mark.parametrize(("method", "path", "_scope"), ROUTES)
def test_every_route_wants_a_token_unless_it_is_public(
    guarded: TestClient, method: str, path: str, _scope: str
) -> None:
    """Bad input 1: every route answers 401 without a token, but for those that are meant for everybody."""
    answer = guarded.request(method, filled(path), follow_redirects=False)

    if path in PUBLIC:
        assert answer.status_code in {200, 204, 303, 415, 503}
        return
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert method == "HEAD" or answer.json()["code"] == "auth_missing"


@pytest.mark.parametrize(("method", "path", "_scope"), CLOSED)
def test_every_closed_route_refuses_a_wrong_token(
    guarded: TestClient, method: str, path: str, _scope: str
) -> None:
    """Bad input 2: a token that is none of the service's opens no route."""
    answer = guarded.request(method, filled(path), headers={"Authorization": "Bearer wrong"})

    assert answer.status_code == 401
    assert method == "HEAD" or answer.json()["code"] == "auth_invalid"


@pytest.mark.parametrize(("method", "path", "scope"), CLOSED)
def test_every_closed_route_wants_its_scope(guarded: TestClient, method: str, path: str, scope: str) -> None:
    """Bad input 3: a token with every scope but those that open a route does not open it."""
    others = ["runs:read", "runs:write", "runs:code", "models:read", "admin"]
    lacking = [name for name in others if name != scope and (scope, name) != ("models:read", "runs:read")]
    full = {"Authorization": f"Bearer {TOKEN}"}
    token = guarded.post("/v1/tokens", json={"name": "lacking", "scopes": lacking}, headers=full).json()

    answer = guarded.request(method, filled(path), headers={"Authorization": f"Bearer {token['secret']}"})

    assert answer.status_code == 403
    assert f'scope="{scope}"' in answer.headers["WWW-Authenticate"]
    assert method == "HEAD" or answer.json()["code"] == "scope_missing"


def filled(path: str) -> str:
    """A path with something in its places."""
    return re.sub(r"\{[^}]*\}", "x", path)


@pytest.mark.parametrize("header", ["Bearer wrong", "Bearer ", "Bearer correct-horse2", "bearer correct-hors"])
def test_a_wrong_token_is_refused(guarded: TestClient, header: str) -> None:
    """Bad input 2: a token that is not the service's is refused, and the answer does not tell the right one."""
    answer = guarded.get("/v1/runs", headers={"Authorization": header})

    assert answer.status_code == 401
    assert answer.json()["code"] in {"auth_invalid", "auth_missing"}
    assert TOKEN not in answer.text


def test_a_token_that_is_not_ascii_is_refused(guarded: TestClient) -> None:
    """Bad input 2: bytes that are no ASCII are a wrong token, not a failure."""
    answer = guarded.get("/v1/runs", headers={"Authorization": b"Bearer \xc3\xa9\xff"})

    assert (answer.status_code, answer.json()["code"]) == (401, "auth_invalid")


def test_the_right_token_opens_the_api(guarded: TestClient) -> None:
    """Whoever sends the service's token is let in."""
    answer = guarded.get("/v1/runs", headers={"Authorization": f"Bearer {TOKEN}"})

    assert answer.status_code == 200


def test_a_body_is_not_read_before_the_token_is_checked(guarded: TestClient) -> None:
    """Strangers learn nothing about what a good submission looks like."""
    answer = guarded.post("/v1/runs", content=b"{", headers={"Content-Type": "application/json"})

    assert answer.status_code == 401


def test_3_a_token_that_only_reads_changes_nothing() -> None:
    """3: with the read token looking is allowed; submitting is 403 `scope_missing` and creates no run."""
    headers = {"Authorization": "Bearer look"}
    with TestClient(create_app(store=MemoryStore(), token=TOKEN, read_token="look"), headers=headers) as client:
        refused = client.post("/v1/runs", json={"recipe": "services.recipes.digits:Digits"})
        assert (refused.status_code, refused.json()["code"]) == (403, "scope_missing")
        listed = client.get("/v1/runs")
    assert (listed.status_code, listed.json()["data"]) == (200, [])
