"""Averages that are added to a run: predicted, validated, listed; by a caller of the API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from support.averaging import averager, run_until_idle
from support.bad_checkpoints import good_state
from support.runs import HandmadeRun
from wa_core import layout
from wa_core.catalog.runs import list_active
from wa_core.records import MAX_AVERAGES, AverageAdded, Succeeded

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from wa_core.store.memory import MemoryStore

STEPS = tuple(range(10, 110, 10))


@pytest.fixture
def run(store: MemoryStore) -> HandmadeRun:
    """A run that has succeeded, with ten checkpoints and a power-function average."""
    run = HandmadeRun(store, averages={"power": "power:sigma_rel=0.1"})
    for step in STEPS:
        run.checkpoint(step, good_state(step))
    run.finish()
    run_until_idle(averager(store))
    run.log.refresh()
    assert isinstance(run.log.entries[-1], Succeeded)
    return run


def lose(run: HandmadeRun, *steps: int) -> None:
    """Delete the weights of these steps."""
    for entry in run.log.lineage:
        if entry.step in steps:
            run.store.delete(entry.files[layout.MODEL_FILE].key)


def post(api: TestClient, run: HandmadeRun, **body: Any) -> tuple[int, dict[str, Any]]:
    """Ask for an average."""
    answer = api.post(f"/v1/runs/{run.run_id}/averages", json={"name": "late", "rule": "swa"} | body)
    return answer.status_code, answer.json()


def added(run: HandmadeRun) -> list[str]:
    """The names of the averages that the log says were added."""
    run.log.refresh()
    return [entry.average.name for entry in run.log.entries if isinstance(entry, AverageAdded)]


def test_an_average_is_added_with_its_prediction(api: TestClient, run: HandmadeRun) -> None:
    """Everything kept: an exact replay. The log says it, an averager is called, and the run lists it, empty."""
    answer = api.post(
        f"/v1/runs/{run.run_id}/averages", json={"name": "late", "rule": "swa", "accumulator_dtype": "float32"}
    )

    sizes = [entry.files[layout.MODEL_FILE].size_bytes for entry in run.log.lineage]
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/v1/runs/{run.run_id}/averages/late"
    assert answer.json()["prediction"] == {
        "how": "replay",
        "profile_error": 0.0,
        "noise_gain": 1.0,
        "reads": 10,
        "read_bytes": sum(sizes),
    }
    shown = api.get(answer.headers["Location"]).json()
    assert {name: value for name, value in answer.json().items() if name != "prediction"} == shown
    assert (shown["name"], shown["rule"], shown["n_averaged"], shown["behind"]) == ("late", "swa", 0, 10)
    assert added(run) == ["late"]
    entry = run.log.entries[-1]
    assert isinstance(entry, AverageAdded)
    assert entry.average.accumulator_dtype == "float32"
    assert list(list_active(run.store)) == [run.run_id]


def test_an_added_average_is_folded_and_served(api: TestClient, run: HandmadeRun) -> None:
    """After the end of the run an averager folds it from the kept checkpoints, and it can be downloaded."""
    post(api, run, rule="window:last=3")

    run_until_idle(averager(run.store))

    shown = api.get(f"/v1/runs/{run.run_id}/averages/late").json()
    assert (shown["n_averaged"], shown["first_step"], shown["behind"], shown["rebuilt"]) == (3, 80, 0, None)
    assert api.get(shown["weights"]["url"]).status_code == 200
    assert list(list_active(run.store)) == []


def test_a_rebuild_is_predicted_before_anything_is_read(api: TestClient, run: HandmadeRun) -> None:
    """With checkpoints gone the answer says how near the average will come, from how many files."""
    lose(run, *STEPS[:7])

    status, body = post(api, run, rule="power:sigma_rel=0.12", dry_run=True)

    assert status == 200
    found = body["prediction"]
    assert found["how"] == "rebuild"
    assert 0 < found["profile_error"] <= 0.05
    assert 1 <= found["noise_gain"] <= 20
    assert 2 <= found["reads"] <= 5
    assert found["read_bytes"] > 0


def test_a_dry_run_adds_nothing(api: TestClient, run: HandmadeRun) -> None:
    """It validates and predicts like the real thing; log, markers and listing stay as they are."""
    status, body = post(api, run, dry_run=True)

    assert (status, body["prediction"]["how"]) == (200, "replay")
    assert added(run) == []
    assert list(list_active(run.store)) == []
    assert api.get(f"/v1/runs/{run.run_id}/averages/late").status_code == 404


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_cannot_be_rebuilt_is_refused(api: TestClient, run: HandmadeRun, *, dry_run: bool) -> None:
    """422 `cannot_rebuild` with both numbers and what to ask for instead; nothing is added."""
    lose(run, *STEPS[:7])

    status, problem = post(api, run, rule="swa", dry_run=dry_run)

    assert (status, problem["code"]) == (422, "cannot_rebuild")
    for words in ("7 of the 10", "profile error", "noise gain", "start_step=71"):
        assert words in problem["detail"]
    assert added(run) == []
    assert post(api, run, rule="swa:start_step=71", dry_run=dry_run)[1]["prediction"]["how"] == "replay"


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_name_that_is_taken_is_a_conflict(api: TestClient, run: HandmadeRun, *, dry_run: bool) -> None:
    """409 `average_exists`, for a submitted name and for an added one."""
    post(api, run)

    for name in ("power", "late"):
        status, problem = post(api, run, name=name, dry_run=dry_run)
        assert (status, problem["code"]) == (409, "average_exists")
        assert repr(name) in problem["detail"]
    assert added(run) == ["late"]


@pytest.mark.parametrize(
    ("change", "code", "pointer"),
    [
        ({"rule": "nonsense"}, "invalid_rule", "rule"),
        ({"rule": "window:last_fraction=0.5"}, "invalid_rule", "rule"),
        ({"rule": "swa:start_step=-1"}, "invalid_rule", "rule"),
        ({"rule": "x" * 201}, "invalid_request", "rule"),
        ({"name": "A"}, "invalid_request", "name"),
        ({"name": "\u202eawe"}, "invalid_request", "name"),
        ({"accumulator_dtype": "float16"}, "invalid_request", "accumulator_dtype"),
        ({"dry_run": "yes"}, "invalid_request", "dry_run"),
        ({"dry_rum": True}, "invalid_request", "dry_rum"),
    ],
)
def test_a_bad_addition_is_refused_with_its_place(
    api: TestClient, run: HandmadeRun, change: dict[str, Any], code: str, pointer: str
) -> None:
    """The checks of a submission hold here too: 422, and the place is named."""
    status, problem = post(api, run, **change)

    assert (status, problem["code"]) == (422, code)
    assert problem["errors"][0]["pointer"] == pointer
    assert added(run) == []


def test_an_unknown_field_names_the_nearest(api: TestClient, run: HandmadeRun) -> None:
    """A slip of the pen is shown what was meant, out of the fields of an addition."""
    _, problem = post(api, run, dry_rum=True)

    assert "'dry_run'" in problem["errors"][0]["message"]


def test_a_body_that_is_no_json_is_refused(api: TestClient, run: HandmadeRun) -> None:
    """400 without JSON, 415 for another type, 404 for a run that does not exist."""
    url = f"/v1/runs/{run.run_id}/averages"
    json_type = {"Content-Type": "application/json"}

    assert api.post(url, content=b"{", headers=json_type).json()["code"] == "body_not_json"
    assert api.post(url, content=b'{"a": 1, "a": 2}', headers=json_type).json()["code"] == "duplicate_key"
    assert api.post(url, content=b"x", headers={"Content-Type": "text/plain"}).status_code == 415
    unknown = api.post(f"/v1/runs/{'0' * 26}/averages", json={"name": "late", "rule": "swa"})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "run_not_found")


def test_a_run_has_so_many_averages_at_most(api: TestClient, run: HandmadeRun) -> None:
    """Beyond the limit 409 `too_many_averages`."""
    for number in range(MAX_AVERAGES - 1):
        assert post(api, run, name=f"late-{number}")[0] == 202

    status, problem = post(api, run, name="one-more")

    assert (status, problem["code"]) == (409, "too_many_averages")


def test_the_description_has_the_addition(api: TestClient) -> None:
    """The OpenAPI description says what to send and what comes back."""
    description = api.get("/openapi.json").json()

    route = description["paths"]["/v1/runs/{run_id}/averages"]["post"]
    assert route["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/AverageAddition")
    assert "dry_run" in description["components"]["schemas"]["AverageAddition"]["properties"]
    assert "prediction" in description["components"]["schemas"]["AddedAverage"]["properties"]
