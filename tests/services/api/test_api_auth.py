from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient

from services.api.app import _ROUTERS, create_app
from support.api import TOKEN
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator

PUBLIC = {"/livez", "/readyz", "/version", "/metrics", "/"}
ROUTES = [
    (method, route.path) for router in _ROUTERS for route in router.routes for method in sorted(route.methods)
]


@pytest.fixture
def guarded(store: MemoryStore) -> Iterator[TestClient]:
    """The API with a token."""
    with TestClient(create_app(store=store, token=TOKEN)) as client:
        yield client


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_wants_the_token_unless_it_is_public(guarded: TestClient, method: str, path: str) -> None:
    """Bad input 1: every route answers 401 without a token, but for those that are meant for everybody."""
    answer = guarded.request(method, path.replace("{run_id}", "x").replace("{name}", "x"))

    if path in PUBLIC:
        assert answer.status_code in {200, 503}
        return
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert method == "HEAD" or answer.json()["code"] == "auth_missing"


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
