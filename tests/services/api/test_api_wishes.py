"""What owners ask of runs: pause, resume, rewind, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support.api import ApiRun
from wa_core import layout
from wa_core.catalog.runs import list_queue
from wa_core.records import (
    CancelRequested,
    Failed,
    Paused,
    ResumeRequested,
    TrainingFinished,
)

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from wa_core.store.memory import MemoryStore


def kinds(run: ApiRun) -> list[str]:
    """The kinds of the run's log entries."""
    run.log.refresh()
    return [entry.kind for entry in run.log.entries]


def ask(api: TestClient, run: ApiRun, wish: str, **body: object) -> tuple[int, str]:
    """The status, and the run's state or the refusal's code."""
    answer = api.post(f"/v1/runs/{run.run_id}:{wish}", json=body or None)
    return answer.status_code, answer.json().get("code") or answer.json()["state"]


def paused_run(store: MemoryStore) -> ApiRun:
    """A run that is paused after two checkpoints."""
    run = ApiRun(store).start()
    for step in (20, 40):
        run.checkpoint(step)
    run.log.append(Paused())
    return run


def test_a_queued_run_pauses_at_once_and_leaves_the_queue(api: TestClient, store: MemoryStore) -> None:
    """A run that no attempt holds is paused by the request itself, in one entry; asking again changes nothing."""
    run = ApiRun(store)

    answers = [ask(api, run, "pause") for _ in range(2)]

    assert answers == [(202, "paused")] * 2
    assert kinds(run) == ["submitted", "paused"]
    assert list(list_queue(store)) == []
    assert api.get(f"/v1/runs/{run.run_id}").json()["desired_state"] == "paused"


def test_a_training_run_is_asked_to_pause_once(api: TestClient, store: MemoryStore) -> None:
    """A run that trains is pausing until its trainer says that it is paused."""
    run = ApiRun(store).start()

    answers = [ask(api, run, "pause") for _ in range(2)]

    assert answers == [(202, "pausing")] * 2
    assert kinds(run).count("pause_requested") == 1


def test_a_paused_run_that_is_resumed_waits_again(api: TestClient, store: MemoryStore) -> None:
    """A paused run goes back into the queue, and wants to succeed again; a body is not needed."""
    run = paused_run(store)

    assert ask(api, run, "resume") == (202, "queued")

    assert [run_id for _, run_id in list_queue(store)] == [run.run_id]
    shown = api.get(f"/v1/runs/{run.run_id}").json()
    assert (shown["desired_state"], shown["step"]) == ("succeeded", 40)


def test_a_rewind_records_the_kept_step_and_the_changes(api: TestClient, store: MemoryStore) -> None:
    """A step between two checkpoints means the one before; learning rate and data changes are recorded with it."""
    run = ApiRun(store).start()
    for step in (20, 40):
        run.checkpoint(step)

    assert ask(api, run, "resume", from_step=39, lr_scale=0.5, skip_batches=7) == (202, "queued")

    run.log.refresh()
    wish = run.log.entries[-1]
    assert isinstance(wish, ResumeRequested)
    assert (wish.from_step, wish.lr_scale, wish.skip_batches) == (20, 0.5, 7)
    assert [run_id for _, run_id in list_queue(store)] == [run.run_id]


def test_f17_a_step_that_is_not_kept_is_refused_with_those_that_are(api: TestClient, store: MemoryStore) -> None:
    """F17: a rewind to before the oldest kept checkpoint is 422 `step_not_kept`, with the steps; 0 begins anew."""
    run = ApiRun(store).start()
    first = run.checkpoint(20)
    run.checkpoint(40)
    store.delete(first.files[layout.MODEL_FILE].key)

    refused = api.post(f"/v1/runs/{run.run_id}:resume", json={"from_step": 30})

    assert (refused.status_code, refused.json()["code"]) == (422, "step_not_kept")
    assert refused.json()["kept_steps"] == [40]
    assert kinds(run)[-1] == "checkpoint"
    assert ask(api, run, "resume", from_step=0) == (202, "queued")


@pytest.mark.parametrize("wish", ["pause", "resume"])
def test_what_has_ended_or_nearly_so_is_neither_paused_nor_resumed(
    api: TestClient, store: MemoryStore, wish: str
) -> None:
    """Bad input 31: 409, with `already_finished`, `already_finalizing` or `being_cancelled`."""
    ended, finalizing, cancelling = (ApiRun(store).start() for _ in range(3))
    ended.log.append(Failed(reason="x"))
    finalizing.log.append(TrainingFinished(step=0))
    cancelling.log.append(CancelRequested())

    answers = [ask(api, run, wish) for run in (ended, finalizing, cancelling)]

    assert answers == [(409, "already_finished"), (409, "already_finalizing"), (409, "being_cancelled")]


def test_there_is_nothing_to_resume_of_a_run_that_goes_on(api: TestClient, store: MemoryStore) -> None:
    """A plain resume of a run that waits, trains or is still pausing is a 409 that says which."""
    waits, trains, pausing = ApiRun(store), ApiRun(store).start(), ApiRun(store).start()
    ask(api, pausing, "pause")

    answers = [ask(api, run, "resume") for run in (waits, trains, pausing)]

    assert answers == [(409, "not_paused"), (409, "not_paused"), (409, "still_pausing")]


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"from_step": -1}, "from_step"),
        ({"from_step": "3"}, "from_step"),
        ({"lr_scale": 0}, "lr_scale"),
        ({"skip_batches": -1}, "skip_batches"),
        ({"from_stepp": 1}, "from_stepp"),
    ],
)
def test_impossible_changes_are_refused(
    api: TestClient, store: MemoryStore, body: dict[str, object], pointer: str
) -> None:
    """A resume that cannot be meant is 422 with its place, and nothing is recorded."""
    run = paused_run(store)

    answer = api.post(f"/v1/runs/{run.run_id}:resume", json=body)

    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, pointer)
    assert kinds(run)[-1] == "paused"


def test_a_cancel_is_the_last_word(api: TestClient, store: MemoryStore) -> None:
    """A paused run that is cancelled ends at once; a pause that was on its way does not bring it back."""
    run = paused_run(store)

    assert ask(api, run, "cancel") == (202, "cancelled")
    assert ask(api, run, "resume") == (409, "already_finished")
