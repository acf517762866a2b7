"""Runs that their owners train, as the API shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from support.api import submission
from wa_core import register_run

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from wa_core.store.memory import MemoryStore


def test_a_run_of_ones_own_is_shown_like_any_other(api: TestClient, store: MemoryStore) -> None:
    """State, progress, checkpoints and averages are there; it says who trains it, and that it has no recipe."""
    with register_run(store, averages={"swa": "swa"}, labels={"team": "own"}, total_steps=20) as registered:
        registered.offer(10, {"w": torch.ones(3)}, metrics={"loss": 0.5})

    run = api.get(f"/v1/runs/{registered.run_id}").json()
    assert (run["trainer"], run["recipe"], run["state"]) == ("own", None, "finalizing")
    assert (run["step"], run["total_steps"], run["metrics"]) == (10, 20, {"loss": 0.5})
    assert run["labels"] == {"team": "own"}
    (checkpoint,) = api.get(f"/v1/runs/{registered.run_id}/checkpoints").json()["data"]
    assert checkpoint["step"] == 10
    (average,) = api.get(f"/v1/runs/{registered.run_id}/averages").json()["data"]
    assert (average["name"], average["behind"]) == ("swa", 1)
    assert [found["run_id"] for found in api.get("/v1/runs").json()["data"]] == [registered.run_id]


def test_a_failed_run_of_ones_own_says_why(api: TestClient, store: MemoryStore) -> None:
    """The exception that ended the loop is the run's reason."""
    registered = register_run(store)
    registered.fail(ValueError("bad\ndata"))

    run = api.get(f"/v1/runs/{registered.run_id}").json()

    assert (run["state"], run["reason"]) == (
        "failed",
        {"code": "trainer_failed", "message": "ValueError: bad data"},
    )


def test_a_run_without_a_recipe_cannot_be_submitted(api: TestClient) -> None:
    """What the service is to train needs a recipe; the spelling for none is refused like any foreign one."""
    answer = api.post("/v1/runs", json=submission(recipe="none:none"))

    assert (answer.status_code, answer.json()["code"]) == (422, "recipe_not_allowed")
