"""Verifications as a caller of the API asks for them and sees them; the averager is played by the test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from support.api import ApiRun
from wa_core.catalog.jobs import MAX_UNFINISHED, list_wanted
from wa_core.catalog.verifications import Verifications
from wa_core.clock import SystemClock
from wa_core.records import JobProgress

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from wa_core.store.memory import MemoryStore


def ask(api: TestClient, run: ApiRun, query: str = "") -> Any:
    """Ask for a verification."""
    return api.post(f"/v1/runs/{run.run_id}/averages/swa:verify{query}")


def known(run: ApiRun) -> Verifications:
    """What the bucket has of them."""
    return Verifications(run.store, run.run_id, "swa")


def finish(run: ApiRun, verification_id: str, **fields: Any) -> None:
    """Do an averager's work."""
    now = SystemClock().now()
    known(run).finish(known(run).outcome(verification_id, at=now, **fields))


def test_a_verification_is_wanted_until_there_is_a_finding(api: TestClient, run: ApiRun) -> None:
    """Queued, running with progress, then equal: each state is what the records say."""
    answer = ask(api, run)

    assert answer.status_code == 202
    asked = answer.json()
    where, verification_id = answer.headers["Location"], asked["verification_id"]
    assert where == f"/v1/runs/{run.run_id}/averages/swa/verifications/{verification_id}"
    assert asked == api.get(where).json()
    assert (asked["generation"], asked["state"], asked["is_equal"]) == (1, "queued", None)
    assert list(list_wanted(run.store, "verifications")) == [(run.run_id, "swa", verification_id)]

    now = SystemClock().now()
    known(run).begin(verification_id, attempt=1, at=now, who="me")
    known(run).report(verification_id, JobProgress(attempt=1, who="me", at=now, progress=0.5))
    assert {"state": "running", "progress": 0.5}.items() <= api.get(where).json().items()

    finish(run, verification_id, state="succeeded", is_equal=True, is_served_equal=True, num_checkpoints=1)
    done = api.get(where).json()
    assert (done["state"], done["progress"], done["is_equal"], done["reason"]) == ("succeeded", 1, True, None)
    assert (done["is_state_equal"], done["is_served_equal"], done["num_checkpoints"]) == (None, True, 1)
    listed = api.get(f"/v1/runs/{run.run_id}/averages/swa/verifications").json()["data"]
    assert listed == [done]


def test_a_difference_says_what_differs(api: TestClient, run: ApiRun) -> None:
    """It is a finding, so the work succeeded; its code and its message are the reason."""
    where = ask(api, run).headers["Location"]
    finish(run, where.rpartition("/")[2], state="succeeded", is_equal=False, code="weights_differ", message="fc")

    shown = api.get(where).json()

    assert (shown["state"], shown["is_equal"]) == ("succeeded", False)
    assert shown["reason"] == {"code": "weights_differ", "message": "fc"}


def test_a_generation_can_be_chosen_as_for_a_download(api: TestClient, run: ApiRun) -> None:
    """By its number, or the best; one that is not there is not found, and two choices are one too many."""
    run.checkpoint(40)
    run.fold(body=b"newer")

    assert ask(api, run).json()["generation"] == 2
    assert ask(api, run, "?generation=1").json()["generation"] == 1
    assert ask(api, run, "?generation=9").json()["code"] == "generation_not_found"
    assert ask(api, run, "?generation=1&step=20").status_code == 422


def test_32_nothing_published_is_a_conflict(api: TestClient, store: MemoryStore) -> None:
    """Bad input 32: without weights there is nothing to verify."""
    answer = ask(api, ApiRun(store).start())

    assert (answer.status_code, answer.json()["code"]) == (409, "no_average_yet")


def test_too_many_verifications_are_refused(api: TestClient, run: ApiRun) -> None:
    """Each reads every checkpoint of the average, so only a few may wait."""
    verification_id, *_ = [ask(api, run).json()["verification_id"] for _ in range(MAX_UNFINISHED)]

    assert (ask(api, run).status_code, ask(api, run).json()["code"]) == (409, "too_many_verifications")
    finish(run, verification_id, state="failed", code="checkpoint_missing", message="step 20")
    assert ask(api, run).status_code == 202


@pytest.mark.parametrize("verification_id", ["x", "0" * 26, "a%00b", "Z" * 9000])
def test_5_unknown_verifications_are_not_found(api: TestClient, run: ApiRun, verification_id: str) -> None:
    """Bad inputs 4 and 5: ids that are none, and ids of nothing."""
    answer = api.get(f"/v1/runs/{run.run_id}/averages/swa/verifications/{verification_id}")

    assert answer.status_code == 404
    assert api.get(f"/v1/runs/{run.run_id}/averages/no/verifications").status_code == 404
    assert api.post(f"/v1/runs/{run.run_id}/averages/no:verify").status_code == 404
