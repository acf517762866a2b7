"""A runner leaves runs alone that their owners train."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.trainer.runner import Runner, RunnerConfig
from support.training import log_of
from wa_core import layout
from wa_core.catalog import own_runs
from wa_core.catalog.runs import RunLog, list_queue
from wa_core.clock import ManualClock
from wa_core.records import (
    CancelRequested,
    Heartbeat,
    Marker,
    PauseRequested,
    ResumeRequested,
    RunRequest,
    RunState,
)
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from wa_core.store.base import ObjectStore


@pytest.fixture
def store() -> MemoryStore:
    """A bucket."""
    return MemoryStore()


@pytest.fixture
def run_id(store: MemoryStore) -> str:
    """A run of one's own, in its first attempt."""
    clock = ManualClock()
    spec = own_runs.register(store, RunRequest(recipe="none:none"), clock=clock)
    own_runs.begin(RunLog(store, spec.run_id, clock=clock))
    return spec.run_id


@pytest.fixture
def runner(store: MemoryStore) -> Runner:
    """A runner that concludes after ten seconds of silence; a driver of its would fail at once."""
    config = RunnerConfig("elsewhere/0/1/x", driver=("/bin/false",), look_around_interval_s=0.0, lost_after_s=10)
    return Runner(store, config, ManualClock(), totals=dict)


def beat(store: ObjectStore, run_id: str, *, step: int) -> None:
    """A sign of life of the trainer."""
    sign = Heartbeat(who="trainer", at=ManualClock().now(), attempt=1, step=step)
    store.put(layout.heartbeat(run_id, "trainer"), sign.model_dump_json().encode())


def test_a_silent_trainer_of_ones_own_is_not_taken_over(store: MemoryStore, run_id: str, runner: Runner) -> None:
    """However long nothing is heard of it, the run stays its owner's."""
    for _ in range(5):
        runner.tick()
        runner.clock.advance(3600)

    assert [entry.kind for entry in log_of(store, run_id).entries] == ["submitted", "attempt_started"]


def test_a_run_of_ones_own_in_the_queue_is_not_claimed(store: MemoryStore, run_id: str, runner: Runner) -> None:
    """A resume over the API queues it for its owner, not for a runner; the marker goes."""
    log = log_of(store, run_id)
    log.append(PauseRequested())
    log.append(ResumeRequested())
    marker = Marker(run_id=run_id, at=ManualClock().now())
    store.put(layout.queue_marker(run_id, priority=50), marker.model_dump_json().encode())

    runner.tick()

    assert log_of(store, run_id).state is RunState.QUEUED
    assert list(list_queue(store)) == []


def test_an_unwanted_run_of_ones_own_ends_once_its_trainer_is_silent(
    store: MemoryStore, run_id: str, runner: Runner
) -> None:
    """A trainer that lives ends a cancelled run itself; a runner does so for one that is not heard of."""
    log_of(store, run_id).append(CancelRequested())
    for step in range(4):
        beat(store, run_id, step=step)
        runner.tick()
        runner.clock.advance(8)
    assert log_of(store, run_id).state is RunState.STARTING

    runner.clock.advance(3)
    runner.tick()

    assert log_of(store, run_id).state is RunState.CANCELLED
