from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from support.api import DIGITS, ApiRun, submission
from wa_core import layout
from wa_core.catalog.runs import fetch_spec, list_queue
from wa_core.records import (
    AttemptFailed,
    CancelRequested,
    Failed,
    PauseRequested,
    Succeeded,
    TrainingFinished,
)

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from wa_core.store.memory import MemoryStore

FIELDS = {
    "run_id",
    "state",
    "desired_state",
    "averaging_state",
    "reason",
    "trainer",
    "recipe",
    "package",
    "config",
    "scaling",
    "averages",
    "labels",
    "step",
    "total_steps",
    "eta_s",
    "attempt",
    "metrics",
    "created_at",
    "updated_at",
    "checkpoint",
    "training",
    "priority",
    "max_failures",
    "seed",
    "deadlines",
    "owner",
}


def test_a_submission_is_queued(api: TestClient, store: MemoryStore) -> None:
    """A good submission answers 202 with where the run is, and the run waits in the queue."""
    answer = api.post("/v1/runs", json=submission(config={"epochs": 3}, labels={"team": "vision"}))

    run = answer.json()
    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/v1/runs/{run['run_id']}"
    assert set(run) == FIELDS
    assert (run["state"], run["desired_state"], run["averaging_state"]) == ("queued", "succeeded", "waiting")
    assert (run["recipe"], run["config"], run["step"], run["attempt"]) == (DIGITS, {"epochs": 3}, 0, 0)
    assert [run_id for _, run_id in list_queue(store)] == [run["run_id"]]
    assert fetch_spec(store, run["run_id"]).request.labels == {"team": "vision"}


def test_a_run_tells_its_planned_steps(api: TestClient) -> None:
    """How many steps a run will take is known before it starts."""
    total = [api.post("/v1/runs", json=submission(config={"epochs": n})).json()["total_steps"] for n in (1, 3)]

    assert total[0] > 0
    assert total[1] == 3 * total[0]


def test_a_run_that_steps_shows_as_running(api: TestClient, store: MemoryStore) -> None:
    """A started run is `running` from its first step on, which its heartbeat tells before any checkpoint."""
    run = ApiRun(store).start()
    starting = api.get(f"/v1/runs/{run.run_id}").json()
    run.beat(step=7, loss=1.5)

    running = api.get(f"/v1/runs/{run.run_id}").json()

    assert starting["state"] == "starting"
    assert (running["state"], running["step"], running["total_steps"]) == ("running", 7, 264)
    assert running["metrics"] == {"loss": 1.5}


def test_a_run_says_how_long_it_will_still_take(api: TestClient, store: MemoryStore) -> None:
    """What is left of its steps, at the pace that its trainer tells; nothing before and after training."""
    run = ApiRun(store).start()
    url = f"/v1/runs/{run.run_id}"
    assert api.get(url).json()["eta_s"] is None
    run.beat(step=64, total_steps=264, steps_per_s=0.8)

    assert api.get(url).json()["eta_s"] == 250.0

    run.log.append(TrainingFinished(step=264))
    assert api.get(url).json()["eta_s"] is None


def test_an_older_attempts_heartbeat_counts_for_nothing(api: TestClient, store: MemoryStore) -> None:
    """After a restart the step goes back to the last surviving checkpoint's."""
    run = ApiRun(store).start()
    kept = run.checkpoint(20)
    run.beat(step=33)
    run.log.append(AttemptFailed(reason="worker_died", message="rank 1 was killed"))
    recovering = api.get(f"/v1/runs/{run.run_id}").json()
    run.start(resumed_from=kept.seq)

    again = api.get(f"/v1/runs/{run.run_id}").json()

    assert (recovering["state"], recovering["reason"]["code"]) == ("recovering", "worker_died")
    assert (again["state"], again["step"], again["attempt"], again["reason"]) == ("starting", 20, 2, None)


def test_a_failed_run_says_why(api: TestClient, store: MemoryStore) -> None:
    """A failed run carries the reason's code and message."""
    run = ApiRun(store).start()
    run.log.append(Failed(reason="user_code", message="ValueError: no"))

    shown = api.get(f"/v1/runs/{run.run_id}").json()

    assert (shown["state"], shown["reason"]) == ("failed", {"code": "user_code", "message": "ValueError: no"})


def test_averaging_state_follows_the_generations(api: TestClient, store: MemoryStore) -> None:
    """It goes from waiting over folding and assessing to published, and back at a checkpoint."""
    run = ApiRun(store).start()

    def state() -> str:
        return str(api.get(f"/v1/runs/{run.run_id}").json()["averaging_state"])

    seen = [state()]
    run.checkpoint(20)
    seen.append(state())
    run.fold()
    seen.append(state())
    run.fold(body=b"weights")
    seen.append(state())
    run.checkpoint(40)
    seen.append(state())

    assert seen == ["waiting", "waiting", "assessing", "published", "folding"]


def test_an_average_added_after_the_end_is_waited_for(api: TestClient, store: MemoryStore) -> None:
    """A run that has succeeded is folding again from the moment an average is added until that is published."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.fold(body=b"weights")
    run.log.append(TrainingFinished(step=20))
    run.log.append(Succeeded())

    def shown() -> tuple[str, str, list[str], int]:
        found = api.get(f"/v1/runs/{run.run_id}").json()
        names = [average["name"] for average in found["averages"]]
        return found["state"], found["averaging_state"], names, found["step"]

    seen = [shown()]
    run.add("late")
    run.add("later")
    seen.append(shown())
    run.fold("late", body=b"weights")
    run.fold("later", body=b"weights")
    seen.append(shown())

    both = ["swa", "late", "later"]
    assert seen == [
        ("succeeded", "published", ["swa"], 20),
        ("succeeded", "waiting", both, 20),
        ("succeeded", "published", both, 20),
    ]
    assert [found["name"] for found in api.get(f"/v1/runs/{run.run_id}/averages").json()["data"]] == both
    assert api.get(f"/v1/runs/{run.run_id}/averages/late/weights.safetensors").content == b"weights"


def test_an_average_of_an_abandoned_branch_is_folding(api: TestClient, store: MemoryStore) -> None:
    """A published average that holds an abandoned checkpoint is not called published."""
    run = ApiRun(store).start()
    kept = run.checkpoint(20)
    run.checkpoint(40)
    run.fold(body=b"weights")
    run.start(resumed_from=kept.seq)

    assert api.get(f"/v1/runs/{run.run_id}").json()["averaging_state"] == "folding"


def test_an_unchanged_run_is_not_sent_again(api: TestClient, store: MemoryStore) -> None:
    """If-None-Match answers 304 until something about the run changes."""
    run = ApiRun(store)
    etag = api.get(f"/v1/runs/{run.run_id}").headers["ETag"]
    same = api.get(f"/v1/runs/{run.run_id}", headers={"If-None-Match": etag})
    run.start()

    changed = api.get(f"/v1/runs/{run.run_id}", headers={"If-None-Match": etag})

    assert (same.status_code, same.content) == (304, b"")
    assert changed.status_code == 200
    assert changed.headers["ETag"] != etag


def test_waiting_ends_with_the_change(api: TestClient, store: MemoryStore) -> None:
    """A long poll answers soon after the run has changed, long before its seconds are over."""
    run = ApiRun(store)
    seen = {"If-None-Match": api.get(f"/v1/runs/{run.run_id}").headers["ETag"]}
    starter = threading.Timer(0.2, run.start)
    starter.start()
    began_at = time.monotonic()

    answer = api.get(f"/v1/runs/{run.run_id}?wait=55", headers=seen)

    starter.join()
    assert answer.json()["state"] == "starting"
    assert time.monotonic() - began_at < 40


def test_waiting_for_an_ended_run_answers_at_once(api: TestClient, store: MemoryStore) -> None:
    """Nothing will change about an ended run, so nobody waits for it."""
    run = ApiRun(store).start()
    run.log.append(Failed(reason="x"))
    began_at = time.monotonic()

    answer = api.get(f"/v1/runs/{run.run_id}?wait=55")

    assert answer.status_code == 200
    assert time.monotonic() - began_at < 40


def test_pages_list_every_run_once_newest_first(api: TestClient, store: MemoryStore) -> None:
    """Following `next` lists every run once, the newest first."""
    made = [ApiRun(store).run_id for _ in range(7)]

    seen, after = [], None
    for _ in range(10):
        page = api.get("/v1/runs", params={"limit": 3} | ({"after": after} if after else {})).json()
        seen += [run["run_id"] for run in page["data"]]
        after = page["next"]
        if not page["has_more"]:
            break

    assert seen == sorted(made, reverse=True)
    assert after is None


def test_runs_are_found_by_state_and_label(api: TestClient, store: MemoryStore) -> None:
    """`state` and `label`, with a colon or an equals sign, narrow the list down."""
    vision = ApiRun(store, labels={"team": "vision"})
    text = ApiRun(store, labels={"team": "text"}).start()

    by_state = api.get("/v1/runs?state=queued").json()["data"]
    by_label = api.get("/v1/runs?label=team:text").json()["data"]
    assert api.get("/v1/runs?label=team=text").json()["data"] == by_label
    by_both = api.get("/v1/runs?state=queued&label=team:text").json()["data"]

    assert [run["run_id"] for run in by_state] == [vision.run_id]
    assert [run["run_id"] for run in by_label] == [text.run_id]
    assert by_both == []


def test_runs_are_found_by_time_and_owner(api: TestClient, store: MemoryStore) -> None:
    """`created_after` takes runs from that moment on, `created_before` those until just before it."""
    first, second = (api.post("/v1/runs", json=submission()).json() for _ in range(2))

    def found(**query: str) -> list[str]:
        return [run["run_id"] for run in api.get("/v1/runs", params=query).json()["data"]]

    ids = [second["run_id"], first["run_id"]]
    assert found(created_after=first["created_at"]) == ids
    assert found(created_after=second["created_at"]) == ids[:1]
    assert found(created_before=second["created_at"]) == ids[1:]
    assert found(created_after=first["created_at"], created_before=second["created_at"]) == ids[1:]
    assert found(created_after="2020-01-01t00:00:00+02:00") == ids
    assert found(owner="default") == ids
    assert found(owner="alice") == []


def test_several_states_are_alternatives(api: TestClient, store: MemoryStore) -> None:
    """`state` may repeat; labels that may not both hold find nothing."""
    queued, started = ApiRun(store, labels={"n": "1"}), ApiRun(store, labels={"n": "2"}).start()
    ApiRun(store).start().log.append(Failed(reason="x"))

    both = api.get("/v1/runs?state=queued&state=starting").json()["data"]

    assert {run["run_id"] for run in both} == {queued.run_id, started.run_id}
    assert api.get("/v1/runs?label=n:1&label=n:2").json()["data"] == []


def test_checkpoints_come_in_pages(api: TestClient, store: MemoryStore) -> None:
    """Following `next` gives every checkpoint once, in order."""
    run = ApiRun(store).start()
    for step in (20, 40, 60):
        run.checkpoint(step)

    first = api.get(f"/v1/runs/{run.run_id}/checkpoints?limit=2").json()
    second = api.get(f"/v1/runs/{run.run_id}/checkpoints?limit=2&after={first['next']}").json()

    assert [one["step"] for one in first["data"] + second["data"]] == [20, 40, 60]
    assert (first["has_more"], second["has_more"], second["next"]) == (True, False, None)


def test_a_run_that_was_never_wholly_created_is_not_listed(api: TestClient, store: MemoryStore) -> None:
    """What a crash left of a submission is no run."""
    run = ApiRun(store)
    store.delete(layout.run_spec(run.run_id))

    assert api.get("/v1/runs").json()["data"] == []
    assert api.get(f"/v1/runs/{run.run_id}").status_code == 404


def test_cancelling_a_queued_run_ends_it_at_once(api: TestClient, store: MemoryStore) -> None:
    """A run that no runner holds is cancelled by the request itself, and leaves the queue."""
    run = ApiRun(store)

    answer = api.post(f"/v1/runs/{run.run_id}:cancel")

    assert (answer.status_code, answer.json()["state"]) == (202, "cancelled")
    assert list(list_queue(store)) == []


def test_cancelling_a_running_run_asks_its_runner(api: TestClient, store: MemoryStore) -> None:
    """A run that a runner holds is only asked to end, however often that is done."""
    run = ApiRun(store).start()

    answers = [api.post(f"/v1/runs/{run.run_id}:cancel") for _ in range(2)]

    run.log.refresh()
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[1].json()["desired_state"] == "cancelled"
    assert answers[1].json()["state"] == "starting"
    assert sum(isinstance(entry, CancelRequested) for entry in run.log.entries) == 1


def test_a_finished_run_cannot_be_cancelled(api: TestClient, store: MemoryStore) -> None:
    """Bad input 31: cancelling a run that has ended is a conflict with code `already_finished`."""
    run = ApiRun(store).start()
    run.log.append(TrainingFinished(step=0))
    finalizing = api.post(f"/v1/runs/{run.run_id}:cancel")
    run.log.append(Succeeded())

    answer = api.post(f"/v1/runs/{run.run_id}:cancel")

    assert (finalizing.status_code, finalizing.json()["code"]) == (409, "already_finalizing")
    assert (answer.status_code, answer.json()["code"]) == (409, "already_finished")


def test_desired_state_is_what_was_asked_for_last(api: TestClient, store: MemoryStore) -> None:
    """The desired state follows the owner's wishes in the log."""
    run = ApiRun(store).start()
    run.log.append(PauseRequested())

    assert api.get(f"/v1/runs/{run.run_id}").json()["desired_state"] == "paused"


def test_checkpoints_tell_which_are_abandoned(api: TestClient, store: MemoryStore) -> None:
    """All committed checkpoints are listed, and those behind a restart are marked."""
    run = ApiRun(store).start()
    kept = run.checkpoint(20, loss=0.5)
    run.checkpoint(40)
    run.start(resumed_from=kept.seq)
    run.checkpoint(41)

    listed = api.get(f"/v1/runs/{run.run_id}/checkpoints").json()["data"]

    assert [(one["step"], one["attempt"], one["is_abandoned"]) for one in listed] == [
        (20, 1, False),
        (40, 1, True),
        (41, 2, False),
    ]
    assert listed[0]["metrics"] == {"loss": 0.5}
    assert listed[0]["size_bytes"] > 0
