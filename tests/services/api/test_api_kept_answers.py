"""Answers that are kept with the snapshot they were made of, and keys that are remembered (ADR 42)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient

from services.api.state.budget import Budget
from support.api import ApiRun, app_over, submission
from wa_core.clock import ManualClock

if TYPE_CHECKING:
    from wa_core.store.memory import MemoryStore

PATHS = ("averages", "averages/swa", "events", "checkpoints")


def out_of_time() -> Budget:
    """A budget that lets nobody look."""
    return Budget(share=0.0, most_s=0.0, clock=ManualClock())


@pytest.mark.parametrize("path", PATHS)
def test_a_kept_answer_is_the_one_that_a_look_gives(store: MemoryStore, path: str) -> None:
    """While many ask, an answer has the bytes and the ETag of a fresh one, the second time too, and after news."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.fold(body=b"weights")
    app = app_over(store)
    url = f"/v1/runs/{run.run_id}/{path}"
    with TestClient(app) as api:
        for step in (40, 60):
            api.get(f"/v1/runs/{run.run_id}")
            fresh = api.get(url)
            looks, app.state.catalog._looks = app.state.catalog._looks, out_of_time()
            kept = [api.get(url) for _ in range(2)]
            unchanged = api.get(url, headers={"If-None-Match": fresh.headers["etag"]})
            app.state.catalog._looks = looks
            run.checkpoint(step)
            run.fold(body=b"weights")

            assert [answer.content for answer in kept] == [fresh.content] * 2
            assert {answer.headers["etag"] for answer in kept} == {fresh.headers["etag"]}
            assert unchanged.status_code == 304
        assert api.get(url).content != fresh.content


def test_pages_of_one_run_are_kept_apart_and_few(store: MemoryStore) -> None:
    """Each page is its own, however many are asked for, and a run keeps no more than a handful."""
    run = ApiRun(store).start()
    for step in range(20, 400, 20):
        run.checkpoint(step)
    app = app_over(store)
    with TestClient(app) as api:
        api.get(f"/v1/runs/{run.run_id}")
        app.state.catalog._looks = out_of_time()
        for _ in range(2):
            seen = [
                api.get(f"/v1/runs/{run.run_id}/events?limit=1&after={after}").json()["data"][0]["seq"]
                for after in range(20)
            ]
            assert seen == list(range(1, 21))
        known = app.state.catalog.recent(run.run_id)

    assert known is not None
    assert len(known.rendered) <= 8


def test_29_a_remembered_key_stands_for_one_body(store: MemoryStore) -> None:
    """Bad input 29: a key is refused with another body, by the replica that remembers it and by another."""
    headers = {"Idempotency-Key": "k"}
    with TestClient(app_over(store)) as one, TestClient(app_over(store)) as other:
        first = one.post("/v1/runs", json=submission(seed=1), headers=headers).json()["run_id"]

        for api in (one, other, other):
            refused = api.post("/v1/runs", json=submission(seed=2), headers=headers)
            again = api.post("/v1/runs", json=submission(seed=1), headers=headers)

            assert (refused.status_code, refused.json()["code"]) == (422, "idempotency_key_reused")
            assert (again.status_code, again.json()["run_id"]) == (202, first)
