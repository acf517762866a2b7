"""Pause, rewind, waiting and kills on the embedded stack, with real Ray training; afterwards nothing is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from support.descendants import descendants
from support.leftovers import check_nothing_is_left
from support.patience import eventually
from support.stack import RunningStack, kill, submission
from wa_core.catalog.runs import RunLog
from wa_core.clock import SystemClock
from wa_core.records import AttemptStarted

if TYPE_CHECKING:
    from wa_core.records import Entry

LONG = {"epochs": 3000, "lr": 0.01}

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]


def log_of(stack: RunningStack, run_id: str) -> list[Entry]:
    """The run's log."""
    log = RunLog(stack.store(), run_id, clock=SystemClock())
    log.refresh()
    return list(log.entries)


def has_state(stack: RunningStack, run_id: str, *states: str) -> dict[str, Any] | None:
    """The run, once it is in one of these states."""
    with stack.client() as client:
        run = client.run(run_id)
    return run if run["state"] in states else None


def test_f26_a_run_larger_than_the_cluster_is_queued_and_expires(stack: RunningStack) -> None:
    """F26: `queued` with the reason `insufficient_resources`, then `failed` with it at the queue deadline."""
    with stack.client() as client:
        scaling = {"num_workers": 999, "use_gpu": False}
        run_id = client.submit(submission(scaling=scaling, deadlines={"queue_s": 15.0}))["run_id"]

    waiting = eventually(
        lambda: (run := has_state(stack, run_id, "queued")) and run["reason"] and run, what="a reason"
    )
    failed = eventually(lambda: has_state(stack, run_id, "failed"), what="the deadline")

    assert waiting["reason"]["code"] == failed["reason"]["code"] == "insufficient_resources"
    assert "999 CPUs" in waiting["reason"]["message"]
    assert [entry.kind for entry in log_of(stack, run_id)] == ["submitted", "failed"]


def has_reached(stack: RunningStack, run_id: str, step: int, *, attempt: int) -> bool:
    """Whether an attempt has kept a checkpoint at or after a step."""
    with stack.client() as client:
        kept = client.checkpoints(run_id)
    return any(found["step"] >= step and found["attempt"] == attempt for found in kept)


def test_f16_a_run_goes_back_loses_its_driver_and_pauses_and_then_holds_nothing(stack: RunningStack) -> None:
    """F16, F17: attempts grow from where they should; paused, the run has no process, no actor and no group."""
    with stack.client() as client:
        run_id = client.submit(submission(config=LONG, averages=[{"name": "swa", "rule": "swa"}]))["run_id"]
        eventually(lambda: has_reached(stack, run_id, 60, attempt=1), timeout_s=120, what="training")
        client.resume(run_id, from_step=45, lr_scale=0.5, skip_batches=3)
        eventually(lambda: has_reached(stack, run_id, 60, attempt=2), timeout_s=120, what="training anew")
        below = descendants(stack.pids()["runner"])
        kill(next(pid for pid, line in below.items() if "trainer.driver" in line))
        eventually(lambda: has_reached(stack, run_id, 80, attempt=3), timeout_s=120, what="recovery")
        client.pause(run_id)
        eventually(lambda: has_state(stack, run_id, "paused"), what="the pause")

    entries = log_of(stack, run_id)
    steps = {entry.seq: entry.step for entry in entries if entry.kind == "checkpoint"}
    starts = [steps.get(entry.resumed_from or 0) for entry in entries if isinstance(entry, AttemptStarted)]
    assert starts[:2] == [None, 40]
    assert starts[2] >= 60
    assert [entry.reason for entry in entries if entry.kind == "attempt_failed"] == ["driver_died"]
    check_nothing_is_left(stack)
