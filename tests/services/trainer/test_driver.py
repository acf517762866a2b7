"""The driver: what it says in the run log when training has ended, and that it never outlives its runner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from services.trainer.context import TrainContext
from services.trainer.driver import Attempt, run_attempt
from services.trainer.failure import Failure
from services.trainer.loop import train
from support.training import digits_request, log_of, start_attempt, submit_run
from wa_core.clock import SystemClock
from wa_core.errors import FencedError, TransientError, UserCodeError
from wa_core.records import CancelRequested, PauseRequested, RunState
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from pathlib import Path

    from services.trainer.job import TrainingJob


@pytest.fixture
def store() -> MemoryStore:
    """An empty bucket."""
    return MemoryStore()


@pytest.fixture
def run_id(store: MemoryStore) -> str:
    """A run in its first attempt."""
    run_id = submit_run(store, digits_request())
    start_attempt(store, run_id)
    return run_id


def test_a_trained_run_is_finalizing(store: MemoryStore, run_id: str) -> None:
    """After the last step the log says `training_finished`, with that step and its metrics."""

    def job(job: TrainingJob) -> None:
        train(TrainContext(store, job.run_id, job.attempt))

    run_attempt(Attempt(run_id, 1), store=store, clock=SystemClock(), train=job)

    log = log_of(store, run_id)
    assert log.state is RunState.FINALIZING
    assert (log.entries[-1].kind, log.entries[-1].step) == ("training_finished", 11)
    assert log.entries[-1].metrics["loss"] > 0


def test_a_cancelled_run_is_cancelled(store: MemoryStore, run_id: str) -> None:
    """Training that was asked to stop ends the run as `cancelled`."""

    def job(job: TrainingJob) -> None:
        log_of(store, job.run_id).append(CancelRequested())

    run_attempt(Attempt(run_id, 1), store=store, clock=SystemClock(), train=job)

    assert log_of(store, run_id).state is RunState.CANCELLED


def test_a_run_that_is_asked_to_pause_is_paused(store: MemoryStore, run_id: str) -> None:
    """Training that was asked to pause leaves the run `paused`."""

    def job(job: TrainingJob) -> None:
        log_of(store, job.run_id).append(PauseRequested())

    run_attempt(Attempt(run_id, 1), store=store, clock=SystemClock(), train=job)

    assert log_of(store, run_id).state is RunState.PAUSED


def test_a_run_that_finishes_while_it_is_asked_to_pause_is_finished(store: MemoryStore, run_id: str) -> None:
    """A pause that comes at the last step finds nothing left to pause."""

    def job(job: TrainingJob) -> None:
        train(TrainContext(store, job.run_id, job.attempt))
        log_of(store, job.run_id).append(PauseRequested())

    run_attempt(Attempt(run_id, 1), store=store, clock=SystemClock(), train=job)

    assert log_of(store, run_id).state is RunState.FINALIZING


def test_a_run_that_is_cancelled_before_it_trains_never_does(store: MemoryStore, run_id: str) -> None:
    """A cancel that comes while the driver starts ends the run at once, without bringing up workers."""
    log_of(store, run_id).append(CancelRequested())
    trained: list[TrainingJob] = []

    run_attempt(Attempt(run_id, 1), store=store, clock=SystemClock(), train=trained.append)

    assert trained == []
    assert log_of(store, run_id).state is RunState.CANCELLED


def test_training_that_just_ends_is_a_failure(store: MemoryStore, run_id: str) -> None:
    """Returning before the last step, with nobody having asked for it, is never taken for success."""
    with pytest.raises(TransientError, match="step 0, before its last one") as caught:
        run_attempt(Attempt(run_id, 1), store=store, clock=SystemClock(), train=lambda _job: None)

    assert caught.value.code == "stopped_early"


def test_f18_a_zombie_driver_cannot_finish_the_run(store: MemoryStore, run_id: str) -> None:
    """F18: a driver whose attempt was taken over while it trained is refused."""

    def job(job: TrainingJob) -> None:
        train(TrainContext(store, job.run_id, job.attempt))
        start_attempt(store, run_id, resumed_from=log_of(store, run_id).lineage[-1].seq)

    with pytest.raises(FencedError):
        run_attempt(Attempt(run_id, 1), store=store, clock=SystemClock(), train=job)

    assert log_of(store, run_id).state is RunState.STARTING


def test_the_reason_of_a_failure_reaches_the_runner(tmp_path: Path) -> None:
    """What the driver leaves is what the runner finds, in one line; nothing left means that the driver died."""
    path = tmp_path / "failure.json"

    Failure.of(UserCodeError("the recipe raised\nZeroDivisionError")).leave(path)

    assert Failure.found(path, exit_code=1) == Failure(
        reason="user_code", message="the recipe raised ZeroDivisionError"
    )
    assert Failure.found(tmp_path / "absent", exit_code=-9).reason == "driver_died"


def test_a_driver_without_its_runner_ends_at_once(tmp_path: Path) -> None:
    """F16: no orphan trains on; the driver and all of its process group die with the runner."""
    driver = subprocess.Popen(
        [
            *(sys.executable, "-m", "services.trainer.driver", "--run-id", "01M818XHNPPHWM4Z1VM3KEZW2V"),
            *("--attempt", "1", "--result", str(tmp_path / "failure.json"), "--parent-pid", "1"),
        ],
        env={**os.environ, "WA_STORE_URL": f"file://{tmp_path}"},
        start_new_session=True,
    )

    assert driver.wait(60) == -signal.SIGKILL
