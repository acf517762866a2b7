"""What an average did, and what another would be: history, preview and distances, by a caller of the API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fastapi.testclient import TestClient

from services.api.answers.history import History
from services.api.state.catalog import Catalog
from support.api import ApiRun, app_over
from support.averaging import WatchedStore
from wa_core import layout
from wa_core.averaging.rules import parse_rule
from wa_core.clock import SystemClock
from wa_core.records import AverageAdded

if TYPE_CHECKING:
    from wa_core.store.memory import MemoryStore


@pytest.fixture
def run(store: MemoryStore) -> ApiRun:
    """A run with four generations, of which the third was never assessed."""
    run = ApiRun(store).start()
    for step in (20, 30, 40, 50):
        run.checkpoint(step)
        run.fold(body=None if step == 40 else b"weights", loss=step / 100)
    return run


def history(api: TestClient, run: ApiRun, **query: Any) -> dict[str, Any]:
    """A page of the average's history."""
    answer = api.get(f"/v1/runs/{run.run_id}/averages/swa/generations", params=query)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_the_history_shows_assessed_generations_in_order(api: TestClient, run: ApiRun) -> None:
    """Each has its steps, its losses beside raw, and the time from its checkpoint to its download."""
    page = history(api, run)

    assert (page["has_more"], page["next"]) == (False, 4)
    assert [(one["generation"], one["step"], one["last_step"], one["n_averaged"]) for one in page["data"]] == [
        (1, 20, 20, 1),
        (2, 30, 30, 2),
        (4, 50, 50, 4),
    ]
    assert [one["evaluation"]["averaged"]["loss"] for one in page["data"]] == [0.2, 0.3, 0.5]
    for one in page["data"]:
        assert one["checkpoint_committed_at"] <= one["created_at"] <= one["published_at"]
        assert 0 <= one["lag_s"] < 60
        assert one["batchnorm"]["layers"] == []


def test_the_history_can_show_every_generation(api: TestClient, run: ApiRun) -> None:
    """With `all`, one that was never assessed is there without a lag or numbers, and gets them once it is."""
    seen = history(api, run, all=1)["data"][2]

    assert (seen["generation"], seen["published_at"], seen["lag_s"], seen["evaluation"]["raw"]) == (
        3,
        None,
        None,
        None,
    )
    run.checkpoint(60)
    run.fold()
    assert history(api, run, all=1)["data"][-1]["published_at"] is None
    run.assess()
    assert history(api, run, all=1)["data"][-1]["published_at"] is not None
    assert history(api, run)["data"][-1]["generation"] == 5


def test_the_history_comes_in_pages(api: TestClient, run: ApiRun) -> None:
    """`next` is where to go on, also after the last page, for what comes later."""
    first = history(api, run, limit=2)
    second = history(api, run, limit=2, after=first["next"])

    assert [one["generation"] for one in first["data"]] == [1, 2]
    assert (first["has_more"], second["has_more"], second["next"]) == (True, False, 4)
    assert [one["generation"] for one in second["data"]] == [4]
    assert history(api, run, after=4) == {"data": [], "has_more": False, "next": 4}
    run.checkpoint(60)
    run.fold(body=b"more")
    assert [one["generation"] for one in history(api, run, after=4)["data"]] == [5]


def test_a_page_seen_before_costs_no_record(store: MemoryStore, run: ApiRun) -> None:
    """Generations never change: asked again, a page lists what is there and reads none of it."""
    catalog = Catalog(watched := WatchedStore(store), clock=SystemClock())
    known = History(catalog)
    first = known.page(run.run_id, "swa", after=0, limit=10, is_whole=False)
    before = watched.num_operations

    assert known.page(run.run_id, "swa", after=0, limit=10, is_whole=False) == first
    assert watched.num_operations - before == 2  # the listings of assessments and of the log
    catalog.close()


def test_a_history_of_nothing_is_empty_or_unknown(api: TestClient, store: MemoryStore) -> None:
    """An average without a generation has an empty history; one that nobody asked for is not found."""
    run = ApiRun(store).start()

    assert history(api, run) == {"data": [], "has_more": False, "next": 0}
    for name in ("other", "a%00b", "..%2f"):
        answer = api.get(f"/v1/runs/{run.run_id}/averages/{name}/generations")
        assert answer.status_code == 404


@pytest.mark.parametrize(
    "query", [{"limit": 10**9}, {"limit": 0}, {"after": -1}, {"after": "x"}, {"all": "maybe"}]
)
def test_bad_pages_are_refused(api: TestClient, run: ApiRun, query: dict[str, Any]) -> None:
    """Bad input 34: a page that is too large, or a cursor that is none."""
    answer = api.get(f"/v1/runs/{run.run_id}/averages/swa/generations", params=query)

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


@pytest.mark.parametrize(
    "rule", ["ema:half_life=7", "swa:start_step=30", "window:last=2,shape=cosine", "power:sigma_rel=0.1"]
)
def test_another_rule_is_drawn_at_once(api: TestClient, run: ApiRun, rule: str) -> None:
    """A preview gives the rule's coefficients of the checkpoints so far, while the run still trains."""
    answer = api.post(f"/v1/runs/{run.run_id}/averages:preview", json={"rule": rule})

    assert answer.status_code == 200
    parsed = parse_rule(rule)
    steps = [step for step in (20, 30, 40, 50) if parsed.counts(step)]
    found = answer.json()
    assert {int(step): part for step, part in found["coefficients"].items()} == parsed.coefficients(steps)
    assert (found["prediction"]["how"], found["reason"]) == ("replay", None)
    assert found["prediction"]["reads"] == len(found["coefficients"])


def test_a_preview_changes_and_reads_nothing(store: MemoryStore, run: ApiRun) -> None:
    """It adds no average, and no file of a checkpoint is read."""
    with TestClient(app_over(watched := WatchedStore(store))) as api:
        api.post(f"/v1/runs/{run.run_id}/averages:preview", json={"rule": "ema:half_life=7"})

    run.log.refresh()
    assert not any(isinstance(entry, AverageAdded) for entry in run.log.entries)
    assert not [key for key in watched.bytes_read if key.startswith(layout.RUNS)]


def test_a_preview_says_when_too_little_is_kept(api: TestClient, run: ApiRun) -> None:
    """The coefficients come all the same, with why nobody could make the average, and what to ask for instead."""
    for entry in run.log.lineage[:2]:
        run.store.delete(entry.files[layout.MODEL_FILE].key)

    found = api.post(f"/v1/runs/{run.run_id}/averages:preview", json={"rule": "swa"}).json()

    assert found["coefficients"] == {"20": 0.25, "30": 0.25, "40": 0.25, "50": 0.25}
    assert (found["prediction"], found["reason"]["code"]) == (None, "cannot_rebuild")
    assert "start_step=31" in found["reason"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"rule": "nonsense"}, 422, "invalid_rule"),
        ({"rule": "ema:decay=1.5"}, 422, "invalid_rule"),
        ({"rule": ""}, 422, "invalid_request"),
        ({"rule": 3}, 422, "invalid_request"),
        ({"rules": "swa"}, 422, "invalid_request"),
    ],
)
def test_bad_rules_are_refused(api: TestClient, run: ApiRun, body: dict[str, Any], status: int, code: str) -> None:
    """Bad inputs 12, 13, 23: a preview checks its rule as an addition does."""
    answer = api.post(f"/v1/runs/{run.run_id}/averages:preview", json=body)

    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_old_assessments_show_no_layers(api: TestClient, run: ApiRun) -> None:
    """An assessment of before there were distances is an average without them."""
    shown = api.get(f"/v1/runs/{run.run_id}/averages/swa").json()

    assert (shown["layers"], shown["batchnorm"]["layers"]) == ([], [])
