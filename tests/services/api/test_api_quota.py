from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient

from support.api import app_over, submission

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.store.memory import MemoryStore

ALICE = {"Authorization": "Bearer a-token"}
BOB = {"Authorization": "Bearer b-token"}


@pytest.fixture
def limited(store: MemoryStore) -> Iterator[TestClient]:
    """The API where two runs of each owner may wait."""
    app = app_over(store, named_tokens={"alice": "a-token", "bob": "b-token"}, max_queued_per_owner=2)
    with TestClient(app) as client:
        yield client


def test_39_an_owner_has_so_many_runs_waiting(limited: TestClient) -> None:
    """39: beyond the quota a submission answers 429 `quota_exceeded` with Retry-After; others' go on."""
    answers = [limited.post("/v1/runs", json=submission(), headers=ALICE) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [202, 202, 429]
    assert answers[-1].json()["code"] == "quota_exceeded"
    assert int(answers[-1].headers["Retry-After"]) > 0
    assert limited.post("/v1/runs", json=submission(), headers=BOB).status_code == 202


def test_39_a_run_that_no_longer_waits_makes_room(limited: TestClient) -> None:
    """39: once a run has gone on, or was cancelled, the next one may be submitted."""
    runs = [limited.post("/v1/runs", json=submission(), headers=ALICE).json()["run_id"] for _ in range(2)]

    limited.post(f"/v1/runs/{runs[0]}:cancel", headers=ALICE)

    assert limited.post("/v1/runs", json=submission(), headers=ALICE).status_code == 202


def test_f13_a_retry_finds_its_run_beyond_the_quota(limited: TestClient) -> None:
    """F13: a submission that is sent again with its key is no new one, and a refused one binds no key."""
    first, other = ALICE | {"Idempotency-Key": "first"}, ALICE | {"Idempotency-Key": "other"}
    run = limited.post("/v1/runs", json=submission(), headers=first).json()
    limited.post("/v1/runs", json=submission(), headers=ALICE)

    again = limited.post("/v1/runs", json=submission(), headers=first)
    refused = limited.post("/v1/runs", json=submission(), headers=other)

    assert (again.status_code, again.json()["run_id"]) == (202, run["run_id"])
    assert refused.status_code == 429
    limited.post(f"/v1/runs/{run['run_id']}:cancel", headers=ALICE)
    assert limited.post("/v1/runs", json=submission(), headers=other).status_code == 202
