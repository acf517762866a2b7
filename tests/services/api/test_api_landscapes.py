"""Landscapes as a caller of the API asks for them and sees them; the averager is played by the test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from support.api import ApiRun
from wa_core.catalog.jobs import MAX_UNFINISHED, list_wanted
from wa_core.catalog.landscapes import Landscapes
from wa_core.clock import SystemClock
from wa_core.records import JobProgress, LandscapeResult, MarkedPoint

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from wa_core.store.memory import MemoryStore


def ask(api: TestClient, run: ApiRun, **body: Any) -> Any:
    """Ask for a landscape."""
    return api.post(f"/v1/runs/{run.run_id}/averages/swa/landscapes", json={"kind": "line"} | body)


def known(run: ApiRun) -> Landscapes:
    """What the bucket has of them."""
    return Landscapes(run.store, run.run_id, "swa")


def result(landscape_id: str, **fields: Any) -> LandscapeResult:
    """What an averager would have found."""
    numbers = {"state": "succeeded", "x": [0.0, 1.0], "heldout": [[2.0, None]], "train": [[1.0, 0.5]]}
    return LandscapeResult(landscape_id=landscape_id, at=SystemClock().now(), **(numbers | fields))


def test_a_landscape_is_wanted_until_there_is_a_result(api: TestClient, run: ApiRun) -> None:
    """Queued, running with progress, succeeded with its numbers: each state is what the records say."""
    answer = ask(api, run, points=11)

    assert answer.status_code == 202
    asked = answer.json()
    where, landscape_id = answer.headers["Location"], asked["landscape_id"]
    assert where == f"/v1/runs/{run.run_id}/averages/swa/landscapes/{landscape_id}"
    assert asked == api.get(where).json()
    assert (asked["kind"], asked["points"], asked["state"], asked["progress"]) == ("line", 11, "queued", 0)
    assert list(list_wanted(run.store, "landscapes")) == [(run.run_id, "swa", landscape_id)]

    now = SystemClock().now()
    known(run).begin(landscape_id, attempt=1, at=now, who="me")
    known(run).report(landscape_id, JobProgress(attempt=1, who="me", at=now, progress=0.25))
    assert {"state": "running", "progress": 0.25}.items() <= api.get(where).json().items()

    marker = MarkedPoint(label="average", x=1.0, y=0.5, step=20, loss=0.5)
    known(run).finish(result(landscape_id, generation=1, markers=[marker], num_heldout=24))
    done = api.get(where).json()
    assert (done["state"], done["progress"], done["generation"]) == ("succeeded", 1, 1)
    assert (done["axis"], done["losses"], done["train_losses"]) == ([0, 1], [2, None], [1, 0.5])
    assert done["markers"] == [{"label": "average", "x": 1, "y": 0.5, "step": 20, "loss": 0.5}]
    assert list(list_wanted(run.store, "landscapes")) == []


def test_a_plane_has_rows(api: TestClient, run: ApiRun) -> None:
    """Its losses are two-dimensional, a row for each coordinate of the second axis."""
    asked = ask(api, run, kind="plane").json()
    rows = [[1.0, 2.0], [3.0, 4.0]]
    known(run).finish(result(asked["landscape_id"], y=[-1.0, 1.0], heldout=rows, train=rows))

    done = api.get(f"/v1/runs/{run.run_id}/averages/swa/landscapes/{asked['landscape_id']}").json()

    assert asked["points"] == 15
    assert (done["axis_y"], done["losses"]) == ([-1, 1], rows)


def test_landscapes_are_listed_newest_first_and_short(api: TestClient, run: ApiRun) -> None:
    """A list has states and no numbers."""
    ids = [ask(api, run).json()["landscape_id"] for _ in range(2)]
    known(run).finish(result(ids[0]))

    listed = api.get(f"/v1/runs/{run.run_id}/averages/swa/landscapes").json()["data"]

    assert [(one["landscape_id"], one["state"]) for one in listed] == [(ids[1], "queued"), (ids[0], "succeeded")]
    assert all(one["losses"] == [] for one in listed)


def test_a_failure_says_why(api: TestClient, run: ApiRun) -> None:
    """Its code and its message are the reason."""
    landscape_id = ask(api, run).json()["landscape_id"]
    known(run).finish(
        LandscapeResult(
            landscape_id=landscape_id,
            at=SystemClock().now(),
            state="failed",
            code="landscape_timeout",
            message="slow",
        )
    )

    shown = api.get(f"/v1/runs/{run.run_id}/averages/swa/landscapes/{landscape_id}").json()

    assert (shown["state"], shown["reason"]) == ("failed", {"code": "landscape_timeout", "message": "slow"})


@pytest.mark.parametrize(
    "body",
    [
        {"kind": "cube"},
        {"points": 2},
        {"points": 202},
        {"kind": "plane", "points": 42},
        {"points": "9"},
        {"point": 9},
    ],
)
def test_impossible_landscapes_are_refused(api: TestClient, run: ApiRun, body: dict[str, Any]) -> None:
    """Bad inputs 12 and 13: unknown kinds and fields, too few and too many points."""
    answer = ask(api, run, **body)

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert list(list_wanted(run.store, "landscapes")) == []


def test_nothing_published_is_a_conflict(api: TestClient, store: MemoryStore) -> None:
    """Bad input 32: without weights there is nothing to go through."""
    answer = ask(api, ApiRun(store).start())

    assert (answer.status_code, answer.json()["code"]) == (409, "no_average_yet")


def test_too_many_landscapes_are_refused(api: TestClient, run: ApiRun) -> None:
    """Each costs minutes of somebody's processor, so only a few may wait."""
    landscape_id, *_ = [ask(api, run).json()["landscape_id"] for _ in range(MAX_UNFINISHED)]

    assert (ask(api, run).status_code, ask(api, run).json()["code"]) == (409, "too_many_landscapes")
    known(run).finish(result(landscape_id))
    assert ask(api, run).status_code == 202


@pytest.mark.parametrize("landscape_id", ["x", "0" * 26, "a%00b", "Z" * 9000])
def test_unknown_landscapes_are_not_found(api: TestClient, run: ApiRun, landscape_id: str) -> None:
    """Bad inputs 4 and 5: ids that are none, and ids of nothing."""
    answer = api.get(f"/v1/runs/{run.run_id}/averages/swa/landscapes/{landscape_id}")

    assert answer.status_code == 404
    assert api.get(f"/v1/runs/{run.run_id}/averages/no/landscapes").status_code == 404


def test_the_first_result_stays(run: ApiRun, api: TestClient) -> None:
    """Two who worked on one landscape may both be done; whoever is second changes nothing."""
    landscape_id = ask(api, run).json()["landscape_id"]

    known(run).finish(result(landscape_id, generation=1))
    known(run).finish(result(landscape_id, generation=2))

    found = known(run).fetch(landscape_id).result
    assert found is not None
    assert found.generation == 1
