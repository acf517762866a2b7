"""Submissions with an Idempotency-Key: one run, whatever happens on the way."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import stamina
from fastapi.testclient import TestClient

from support.api import app_over, submission
from support.faulty import CrashAfter
from wa_core import layout
from wa_core.catalog.runs import RunLog, fetch_spec, list_active, list_queue, list_run_ids
from wa_core.catalog.submissions import claim_key, finish
from wa_core.clock import SystemClock
from wa_core.errors import StoreUnavailableError
from wa_core.records import RunRequest
from wa_core.store.memory import MemoryStore


def send(api: TestClient, *, key: str | None = "5f2c", token: str | None = None, **fields: object) -> Any:
    """The answer to a submission."""
    headers = {"Idempotency-Key": key} if key is not None else {}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    return api.post("/v1/runs", json=submission(**fields), headers=headers)


def test_the_same_key_finds_the_run(api: TestClient, store: MemoryStore) -> None:
    """Sent again, the same submission answers 202 with the same run, also once the run has ended."""
    first = send(api)
    api.post(f"/v1/runs/{first.json()['run_id']}:cancel")

    again = send(api)

    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json()["run_id"] == first.json()["run_id"]
    assert again.json()["state"] == "cancelled"
    assert again.headers["Location"] == first.headers["Location"]
    assert list_run_ids(store) == [first.json()["run_id"]]
    assert list(list_queue(store)) == []


def test_29_a_key_stands_for_one_body(api: TestClient, store: MemoryStore) -> None:
    """Bad input 29: the key with another body is 422, and names the run; the order of fields does not matter."""
    first = send(api, seed=1, priority=2)
    reordered = send(api, priority=2, seed=1)

    refused = send(api, seed=2)

    assert (refused.status_code, refused.json()["code"]) == (422, "idempotency_key_reused")
    assert first.json()["run_id"] in refused.json()["detail"]
    assert reordered.json()["run_id"] == first.json()["run_id"]
    assert len(list_run_ids(store)) == 1


@pytest.mark.parametrize("key", ["", "x" * 201, "a\tb"])
def test_a_key_that_is_none_is_refused(api: TestClient, key: str) -> None:
    """An empty, endless or unprintable key is 422 with its place."""
    answer = send(api, key=key)

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_idempotency_key")


def test_f14_two_replicas_with_one_key_at_once_make_one_run(store: MemoryStore) -> None:
    """F14: two API replicas that get the same key at the same moment answer with one run, submitted once."""
    with (
        TestClient(app_over(store)) as one,
        TestClient(app_over(store)) as other,
        ThreadPoolExecutor(2) as threads,
    ):
        for api in (one, other):
            api.get("/openapi.json")  # FastAPI works out routes when first asked, and not in two threads at once
        for round_number in range(20):
            key = f"round {round_number}"
            answers = list(threads.map(lambda api, key=key: send(api, key=key), [one, other]))
            (run_id,) = {answer.json()["run_id"] for answer in answers}
            log = RunLog(store, run_id, clock=SystemClock())
            log.refresh()
            assert [entry.kind for entry in log.entries] == ["submitted"]
    assert len(list_run_ids(store)) == 20


@pytest.mark.parametrize("num_operations", range(7))
def test_f13_a_submission_that_broke_off_anywhere_is_finished_by_its_retry(num_operations: int) -> None:
    """F13: killed after any operation, the run is whole or not there, and the same key completes it."""
    request, clock, store = RunRequest.model_validate(submission()), SystemClock(), MemoryStore()
    with stamina.set_testing(True, attempts=1), contextlib.suppress(StoreUnavailableError):
        crashing = CrashAfter(store, num_operations)
        finish(crashing, claim_key(crashing, request, key="k", clock=clock), clock=clock)

    claim = claim_key(store, request, key="k", clock=clock)
    finish(store, claim, clock=clock)
    spec = claim.spec

    assert list_run_ids(store) == [spec.run_id]
    assert [run_id for _, run_id in list_queue(store)] == list(list_active(store)) == [spec.run_id]
    assert fetch_spec(store, spec.run_id) == spec
    assert store.head(layout.log_entry(spec.run_id, 1))


def test_keys_and_runs_are_their_owners(store: MemoryStore) -> None:
    """A run is of the owner that its token is named after; two owners may use the same key."""
    app = app_over(store, token="full", named_tokens={"alice": "a-token", "bob": "b-token"})
    with TestClient(app) as api:
        answers = {token: send(api, token=token) for token in ("full", "a-token", "b-token")}
        refused = send(api, token="c-token")

    assert [answer.json()["owner"] for answer in answers.values()] == ["default", "alice", "bob"]
    assert len({answer.json()["run_id"] for answer in answers.values()}) == 3
    assert refused.status_code == 401
