from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fastapi.testclient import TestClient

from services.api.access.token_book import RECHECK_S
from services.api.app import create_app
from support.api import TOKEN, ApiRun, submission
from wa_core.clock import ManualClock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.store.memory import MemoryStore

ADMIN = {"Authorization": f"Bearer {TOKEN}"}
READ = ["runs:read"]


@pytest.fixture
def clock() -> ManualClock:
    """The time of every replica."""
    return ManualClock()


@pytest.fixture
def guarded(store: MemoryStore, clock: ManualClock) -> Iterator[TestClient]:
    """The API with a token."""
    with TestClient(create_app(store=store, token=TOKEN, clock=clock)) as client:
        yield client


def made(client: TestClient, **fields: object) -> dict[str, Any]:
    """A token that was just made."""
    answer = client.post("/v1/tokens", json={"name": "ci", "scopes": READ} | fields, headers=ADMIN)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


def bearer(token: dict[str, Any]) -> dict[str, str]:
    """The header that a token's holder sends."""
    return {"Authorization": f"Bearer {token['secret']}"}


def test_a_secret_is_shown_once(guarded: TestClient) -> None:
    """Making a token answers its secret, which no cache may keep; listing says everything but that."""
    answer = guarded.post("/v1/tokens", json={"name": "ci", "scopes": READ, "expires_in_s": 60}, headers=ADMIN)
    token = answer.json()
    listed = guarded.get("/v1/tokens", headers=ADMIN)

    assert (answer.status_code, answer.headers["Cache-Control"]) == (201, "no-store")
    assert answer.headers["Location"] == f"/v1/tokens/{token['token_id']}"
    assert listed.json()["data"] == [{key: value for key, value in token.items() if key != "secret"}]
    assert token["secret"] not in listed.text
    assert token["secret"].startswith(token["prefix"] + "_")
    assert token["secret"].endswith(token["last_four"])


def test_a_token_opens_what_its_scopes_say(guarded: TestClient) -> None:
    """Bad input 3: each scope opens its routes, and none opens another's."""
    tries = {
        "runs:read": ("GET", "/v1/runs"),
        "runs:write": ("POST", "/v1/runs"),
        "runs:code": ("POST", "/v1/packages"),
        "admin": ("GET", "/v1/tokens"),
    }
    tokens = {scope: made(guarded, scopes=[scope]) for scope in [*tries, "models:read"]}

    opened = {
        scope: {
            name
            for name, (method, path) in tries.items()
            if guarded.request(method, path, headers=bearer(token)).status_code != 403
        }
        for scope, token in tokens.items()
    }

    assert opened == {scope: {scope} for scope in tries} | {"models:read": set()}


@pytest.mark.parametrize("scope", ["models:read", "runs:read"])
def test_models_are_read_with_either_scope(guarded: TestClient, store: MemoryStore, scope: str) -> None:
    """`models:read` downloads averages and raw weights, and no more of a run; `runs:read` downloads as ever."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.fold(body=b"weights")
    token = made(guarded, scopes=[scope])

    download = guarded.get(f"/v1/runs/{run.run_id}/averages/swa/weights.safetensors", headers=bearer(token))
    raw = guarded.get(f"/v1/runs/{run.run_id}/checkpoints/latest/weights.safetensors", headers=bearer(token))
    shown = guarded.get(f"/v1/runs/{run.run_id}", headers=bearer(token))

    assert (download.status_code, download.content) == (200, b"weights")
    assert (raw.status_code, raw.content) == (200, b"checkpoint 20")
    assert shown.status_code == (200 if scope == "runs:read" else 403)


def test_a_run_is_its_tokens(guarded: TestClient) -> None:
    """The owner of a run is the name of the token that submitted it."""
    token = made(guarded, name="vision-team", scopes=["runs:read", "runs:write"])

    answer = guarded.post("/v1/runs", json=submission(), headers=bearer(token))

    assert (answer.status_code, answer.json()["owner"]) == (202, "vision-team")


def test_a_revoked_token_is_refused_everywhere(
    guarded: TestClient, store: MemoryStore, clock: ManualClock
) -> None:
    """Bad input 2: revoked at one replica, a token is refused there at once, and within 5 s at every other."""
    token = made(guarded)
    with TestClient(create_app(store=store, token=TOKEN, clock=clock), headers=bearer(token)) as other:
        assert other.get("/v1/runs").status_code == 200

        revoked = guarded.delete(f"/v1/tokens/{token['token_id']}", headers=ADMIN)
        here = guarded.get("/v1/runs", headers=bearer(token))
        clock.advance(RECHECK_S)
        there = other.get("/v1/runs")

    assert RECHECK_S < 5
    assert (revoked.status_code, revoked.content) == (204, b"")
    assert [(answer.status_code, answer.json()["code"]) for answer in (here, there)] == [(401, "auth_invalid")] * 2
    assert guarded.get("/v1/tokens", headers=ADMIN).json()["data"] == []


def test_a_token_in_use_costs_the_bucket_little(guarded: TestClient, store: MemoryStore) -> None:
    """Between two looks a token is known: a hundred requests read nothing of it."""
    token = made(guarded)
    guarded.get("/openapi.json", headers=bearer(token))
    asked: list[str] = []
    look = store.head
    store.head = lambda key: (asked.append(key), look(key))[1]  # type: ignore[method-assign]

    for _ in range(100):
        assert guarded.get("/openapi.json", headers=bearer(token)).status_code == 200

    assert asked == []


def test_a_token_expires(guarded: TestClient, clock: ManualClock) -> None:
    """Bad input 2: after `expires_in_s` a token opens nothing; it stays in the list with its end."""
    token = made(guarded, expires_in_s=60)

    clock.advance(59)
    before = guarded.get("/v1/runs", headers=bearer(token))
    clock.advance(1)
    after = guarded.get("/v1/runs", headers=bearer(token))

    assert (before.status_code, after.status_code) == (200, 401)
    assert len(guarded.get("/v1/tokens", headers=ADMIN).json()["data"]) == 1


@pytest.mark.parametrize("end", ["0" * 64, "", "x", "é", "0" * 63])
def test_a_token_with_a_wrong_secret_opens_nothing(guarded: TestClient, end: str) -> None:
    """Bad input 2: knowing a token's id, which lists show, is not knowing the token."""
    token = made(guarded)

    answer = guarded.get(
        "/v1/runs", headers={"Authorization": f"Bearer {token['prefix']}_{end}".encode("latin-1")}
    )

    assert (answer.status_code, answer.json()["code"]) == (401, "auth_invalid")


@pytest.mark.parametrize(
    "body",
    [
        {"name": "ci"},
        {"name": "ci", "scopes": []},
        {"name": "ci", "scopes": ["runs:read", "runs:read"]},
        {"name": "ci", "scopes": ["root"]},
        {"name": "ci", "scopes": "admin"},
        {"name": "__proto__", "scopes": READ},
        {"name": "a\nb", "scopes": READ},
        {"name": "ci", "scopes": READ, "__proto__": {"scopes": ["admin"]}},
        {"name": "ci", "scopes": READ, "expires_in_s": 0},
        {"name": "ci", "scopes": READ, "expires_in_s": "60"},
        {"name": "ci", "scopes": READ, "expires_in_s": 1e300},
    ],
)
def test_an_impossible_token_is_refused(guarded: TestClient, store: MemoryStore, body: dict[str, object]) -> None:
    """Bad inputs 12, 13 and 18: what is no token's description answers 422, and nothing is made."""
    answer = guarded.post("/v1/tokens", json=body, headers=ADMIN)

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert not list(store.list("tokens/"))


@pytest.mark.parametrize(("token_id", "status"), [("0" * 16, 404), ("x", 422), ("%2e%2e", 422), ("a%00b", 422)])
def test_an_unknown_token_cannot_be_revoked(guarded: TestClient, token_id: str, status: int) -> None:
    """Bad input 5: an id that no token has is not found, and one that none can have is refused."""
    assert guarded.delete(f"/v1/tokens/{token_id}", headers=ADMIN).status_code == status


def test_an_open_service_makes_no_tokens(api: TestClient, store: MemoryStore) -> None:
    """Nobody makes a token on an open service that would open it on the day when it is closed."""
    answer = api.post("/v1/tokens", json={"name": "ci", "scopes": ["admin"]})

    assert (answer.status_code, answer.json()["code"]) == (409, "service_is_open")
    assert not list(store.list("tokens/"))
