from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient

from services.api.access.rates import REQUESTS, SUBMISSIONS, RateLimits
from services.api.app import create_app
from support.api import TOKEN, submission
from wa_core.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.store.memory import MemoryStore

ALICE = {"Authorization": "Bearer a-token"}
BOB = {"Authorization": "Bearer b-token"}


@pytest.fixture
def limited(store: MemoryStore) -> Iterator[TestClient]:
    """The API with a few requests a day for each owner, and fewer submissions."""
    rates = RateLimits({REQUESTS: "5/day", SUBMISSIONS: "2/day"})
    tokens = {"alice": "a-token", "bob": "b-token"}
    with TestClient(create_app(store=store, token=TOKEN, named_tokens=tokens, rates=rates)) as client:
        yield client


def test_39_too_many_requests_are_told_when_to_come_back(limited: TestClient) -> None:
    """39: beyond the limit every route answers 429 `rate_limited` with Retry-After; others' requests go on."""
    answers = [limited.get("/v1/runs", headers=ALICE) for _ in range(6)]
    refused = answers[-1]

    assert [answer.status_code for answer in answers] == [200] * 5 + [429]
    assert refused.json()["code"] == "rate_limited"
    assert 0 < int(refused.headers["Retry-After"]) <= 86_400
    assert limited.get("/v1/runs", headers=BOB).status_code == 200


def test_answers_say_how_much_is_left(limited: TestClient) -> None:
    """Callers see what is left before they run out, in the headers of the IETF's draft."""
    answers = [limited.get("/v1/runs", headers=ALICE) for _ in range(6)]

    assert {answer.headers["RateLimit-Policy"] for answer in answers} == {'"requests";q=5;w=86400'}
    left = [answer.headers["RateLimit"].partition(";t=")[0] for answer in answers]
    assert left == [f'"requests";r={number}' for number in (4, 3, 2, 1, 0, 0)]


def test_39_submissions_have_a_limit_of_their_own(limited: TestClient, store: MemoryStore) -> None:
    """39: beyond it nothing is submitted, while reading goes on."""
    answers = [limited.post("/v1/runs", json=submission(), headers=ALICE) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert len(list(store.list("active/"))) == 2
    assert limited.get("/v1/runs", headers=ALICE).status_code == 200


def test_39_strangers_are_counted_by_address(limited: TestClient) -> None:
    """39: whoever tries tokens is slowed down, and uses up nobody else's requests."""
    answers = [limited.get("/v1/runs", headers={"Authorization": f"Bearer {i}"}).status_code for i in range(6)]

    assert answers == [401] * 5 + [429]
    assert limited.get("/v1/runs", headers=ALICE).status_code == 200


def test_39_trying_tokens_at_the_door_counts_as_well(limited: TestClient) -> None:
    """39: the sign-in form is no way around the limit."""
    answers = [limited.post("/session", data={"token": f"{i}"}).status_code for i in range(6)]

    assert answers == [401] * 5 + [429]


def test_39_an_open_service_counts_addresses(store: MemoryStore) -> None:
    """39: where nobody has a name the limit is each address's; probes are never counted."""
    with TestClient(create_app(store=store, rates=RateLimits({REQUESTS: "2/day"}))) as client:
        probes = [client.get("/livez").status_code for _ in range(10)]
        answers = [client.get("/v1/runs").status_code for _ in range(3)]

    assert (set(probes), answers) == ({200}, [200, 200, 429])


def test_without_limits_nobody_is_counted(api: TestClient) -> None:
    """Without a limit, answers say nothing of one."""
    assert "RateLimit" not in api.get("/v1/runs").headers


@pytest.mark.parametrize("text", ["many", "5/fortnight", "/minute", "-1/minute"])
def test_an_impossible_limit_is_named(text: str) -> None:
    """A limit that cannot be read ends the start, and the message shows one that can."""
    with pytest.raises(ConfigurationError, match="600/minute"):
        RateLimits({REQUESTS: text})
