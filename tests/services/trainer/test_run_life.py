"""The life of runs under a runner: pauses, rewinds, deadlines, stalls, waiting. Drivers are scripted processes."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from services.api.asked import wishes
from services.trainer.budget import MAX_LOST
from services.trainer.held import Graces
from support.descendants import descendants, is_alive
from support.patience import eventually
from support.scripted_runner import ScriptedRunners
from support.ticked_runner import MakeRunner, kinds, tick_until
from support.training import digits_request, log_of, submit_run
from wa_core import layout
from wa_core.catalog.runs import fetch_spec, list_queue, submit
from wa_core.clock import ManualClock, SystemClock
from wa_core.records import (
    WAITING,
    AttemptStarted,
    Deadlines,
    Heartbeat,
    Resumption,
    RunRequest,
    RunState,
)
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

QUICK = Graces(cancel_s=5.0, start_cancel_s=5.0, interrupt_s=1.0, terminate_s=0.5)


@pytest.fixture
def make_runner(make_runner: MakeRunner) -> MakeRunner:
    """Builds runners that lose patience quickly."""
    return partial(make_runner, heartbeat_interval_s=0.05, graces=QUICK)


def state(store: LocalStore, run_id: str) -> RunState:
    """What a run is doing."""
    return log_of(store, run_id).state


def ask(store: LocalStore, run_id: str, wish: Callable[..., None]) -> None:
    """Let its owner say something."""
    wish(store, fetch_spec(store, run_id), log_of(store, run_id))


def starts(store: LocalStore, run_id: str) -> list[int | None]:
    """The step that each attempt grew from, None for the beginning."""
    entries = log_of(store, run_id).entries
    steps = {entry.seq: entry.step for entry in entries if entry.kind == "checkpoint"}
    return [steps.get(entry.resumed_from or 0) for entry in entries if isinstance(entry, AttemptStarted)]


def reasons(store: LocalStore, run_id: str) -> list[str]:
    """Why attempts, and in the end the run, failed."""
    return [entry.reason for entry in log_of(store, run_id).entries if entry.kind in {"attempt_failed", "failed"}]


def waits_for(store: LocalStore, run_id: str) -> str:
    """What the run waits for, as its runner says."""
    return Heartbeat.model_validate_json(store.get(layout.heartbeat(run_id, WAITING))).reason


def request(num_workers: int = 1, *, max_failures: int = 2, **deadlines: float) -> RunRequest:
    """A run with deadlines."""
    base = digits_request(num_workers=num_workers, max_failures=max_failures)
    return base.model_copy(update={"deadlines": Deadlines(**deadlines)})


def test_a_run_is_paused_and_goes_on_from_where_it_stopped(store: LocalStore, make_runner: MakeRunner) -> None:
    """A pause ends the attempt after a checkpoint and frees its place; the next attempt grows from just there."""
    run_id = submit_run(store, request())
    runner = make_runner("train-half,train")
    tick_until(runner, lambda: len(log_of(store, run_id).lineage) >= 1)

    ask(store, run_id, wishes.pause)
    tick_until(runner, lambda: state(store, run_id) is RunState.PAUSED and not runner.held)
    stopped_at = log_of(store, run_id).lineage[-1].step
    ask(store, run_id, partial(wishes.resume, wanted=Resumption()))
    tick_until(runner, lambda: state(store, run_id) is RunState.FINALIZING)

    assert starts(store, run_id) == [None, stopped_at]
    assert "attempt_failed" not in kinds(store, run_id)
    assert list(list_queue(store)) == []


def test_f17_a_training_run_goes_back_twice(store: LocalStore, make_runner: MakeRunner) -> None:
    """F17: each rewind ends the attempt, and the next grows from the newest checkpoint at or before the step."""
    run_id = submit_run(store, request())
    runner = make_runner("train-half,train-half,train")
    for attempt, (reached, wanted) in enumerate([(20, 17), (20, 9)], start=1):
        tick_until(
            runner,
            lambda attempt=attempt, reached=reached: any(
                entry.step >= reached and entry.attempt == attempt for entry in log_of(store, run_id).lineage
            ),
        )
        ask(store, run_id, partial(wishes.resume, wanted=Resumption(from_step=wanted)))

    tick_until(runner, lambda: state(store, run_id) is RunState.FINALIZING)

    assert starts(store, run_id) == [None, 15, 5]
    assert [entry.step for entry in log_of(store, run_id).lineage] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert reasons(store, run_id) == []


def test_a_pause_before_the_workers_are_up_is_not_waited_for(store: LocalStore, make_runner: MakeRunner) -> None:
    """An attempt without workers has no weights to keep: it is interrupted, and the run paused."""
    run_id = submit_run(store, request())
    runner = make_runner("hang", graces=replace(QUICK, start_cancel_s=0.1))
    runner.tick()

    ask(store, run_id, wishes.pause)
    tick_until(runner, lambda: state(store, run_id) is RunState.PAUSED)

    assert reasons(store, run_id) == []


@pytest.mark.parametrize("verb", ["stall", "hang"])
def test_an_attempt_that_stands_still_is_ended_and_counted(
    store: LocalStore, make_runner: MakeRunner, verb: str
) -> None:
    """An attempt without a step for `stall_s`, or without a first one, is `stalled`, and the next one starts."""
    run_id = submit_run(store, request(stall_s=5.0))
    clock = ManualClock(SystemClock().now())
    runner = make_runner(f"{verb},finish", clock=clock)
    trainer = layout.heartbeat(run_id, "trainer")
    tick_until(runner, lambda: runner.held and (verb == "hang" or any(store.list(trainer))))
    clock.advance(1.0)
    runner.tick()

    clock.advance(4.9 if verb == "stall" else 3.9)
    runner.tick()
    assert reasons(store, run_id) == []

    def is_ended() -> bool:
        clock.advance(0.2)  # also for a driver that is too young to hear SIGINT
        return reasons(store, run_id) != []

    tick_until(runner, is_ended)
    tick_until(runner, lambda: state(store, run_id) is RunState.FINALIZING)

    assert reasons(store, run_id) == ["stalled"]


@pytest.mark.parametrize("verb", ["hang", "hang-half-deaf", "hang-deaf"])
def test_a_driver_is_asked_then_told_then_killed(store: LocalStore, make_runner: MakeRunner, verb: str) -> None:
    """SIGINT, then SIGTERM, then SIGKILL: whatever a driver is deaf to, it comes to its end."""
    run_id = submit_run(store, request(max_failures=0, stall_s=0.3))
    runner = make_runner(verb)
    runner.tick()
    (held,) = runner.held.values()

    tick_until(runner, lambda: state(store, run_id) is RunState.FAILED)

    assert not held.child.is_alive
    assert reasons(store, run_id) == ["stalled", "stalled"]


def test_a_run_over_its_time_fails_and_keeps_what_it_has(store: LocalStore, make_runner: MakeRunner) -> None:
    """`run_s` ends a run that still has failures left, with `run_deadline`."""
    run_id = submit_run(store, request(run_s=1.0))
    runner = make_runner("stall")

    tick_until(runner, lambda: state(store, run_id) is RunState.FAILED)

    assert reasons(store, run_id) == ["run_deadline", "run_deadline"]


def test_f26_a_run_that_is_too_large_waits_and_expires(store: LocalStore, make_runner: MakeRunner) -> None:
    """F26: queued with `insufficient_resources`, overtaken by smaller runs, and ended by its queue deadline."""
    large = submit_run(store, request(num_workers=9, queue_s=1.0))
    small = submit_run(store, request(num_workers=8))
    clock = ManualClock(SystemClock().now())
    runner = make_runner("hang", clock=clock)

    runner.tick()

    assert (state(store, large), waits_for(store, large)) == (RunState.QUEUED, "insufficient_resources")
    assert state(store, small) is RunState.STARTING
    clock.advance(1.1)
    tick_until(runner, lambda: state(store, large) is RunState.FAILED)
    assert reasons(store, large) == ["insufficient_resources"]
    assert kinds(store, large) == ["submitted", "failed"]
    assert large not in {run_id for _, run_id in list_queue(store)}


def test_runs_share_the_cluster_and_large_ones_are_not_kept_out(
    store: LocalStore, make_runner: MakeRunner
) -> None:
    """Several runs train side by side; who waits for what others hold is not overtaken by smaller ones."""
    first, second, third = (submit_run(store, request(num_workers=number)) for number in (6, 4, 1))
    runner = make_runner("hang,finish", max_concurrent_runs=3)

    runner.tick()
    runner.tick()

    assert [state(store, run_id) for run_id in (first, second, third)] == [
        RunState.STARTING,
        RunState.QUEUED,
        RunState.QUEUED,
    ]
    assert waits_for(store, second) == "resources_busy"
    os.kill(runner.held[first].child.pid, signal.SIGKILL)
    tick_until(runner, lambda: state(store, third) is not RunState.QUEUED)
    assert state(store, second) is not RunState.QUEUED


def test_an_owner_at_the_limit_waits_and_others_do_not(store: LocalStore, make_runner: MakeRunner) -> None:
    """`max_runs_per_owner` lets the runs of one owner wait for each other, and for nobody else."""
    clock = SystemClock()
    first, second = (submit(store, request(), clock=clock, owner="alice").run_id for _ in range(2))
    other = submit(store, request(), clock=clock, owner="bob").run_id
    runner = make_runner("hang", max_concurrent_runs=3, max_runs_per_owner=1)

    runner.tick()
    runner.tick()

    assert {run_id: held.spec.owner for run_id, held in runner.held.items()} == {first: "alice", other: "bob"}
    assert waits_for(store, second) == "owner_at_limit"


def test_while_the_cluster_is_unknown_nothing_starts_or_fails(store: LocalStore, make_runner: MakeRunner) -> None:
    """A cluster that has not answered is unknown: a run waits for it, and says so."""
    run_id = submit_run(store, request())
    runner = make_runner("train", num_cpus=None)

    runner.tick()
    runner.tick()

    assert (state(store, run_id), waits_for(store, run_id)) == (RunState.QUEUED, "cluster_unknown")


def test_a_run_that_waits_unseen_is_found(store: LocalStore, make_runner: MakeRunner) -> None:
    """A queued run whose marker is missing, because whoever resumed it died, gets its marker back and starts."""
    run_id = submit_run(store, request())
    ((marker, _),) = list_queue(store)
    store.delete(marker)

    tick_until(make_runner("train"), lambda: state(store, run_id) is RunState.FINALIZING)


def test_f16_a_run_that_kills_its_runners_is_ended(tmp_path: Path) -> None:
    """F16: after some runners lost in a row without a checkpoint the run fails, and the last runner lives."""
    with ScriptedRunners(tmp_path, "kill-runner") as runners:
        store = LocalStore(runners.bucket)
        run_id = submit_run(store, request())
        for _ in range(MAX_LOST):
            assert runners.start().wait(60) == -signal.SIGKILL
        last = runners.start()
        eventually(lambda: state(store, run_id) is RunState.FAILED, what="giving up")
        assert runners.stop(last) == 0

    assert reasons(store, run_id) == ["runner_lost"] * (MAX_LOST + 1)


def test_f16_a_killed_runner_leaves_nothing_and_its_run_goes_on(tmp_path: Path) -> None:
    """F16: SIGKILL of the runner ends its drivers; the next one takes over at once and clears its folder."""
    with ScriptedRunners(tmp_path, "train-half,train") as runners:
        store = LocalStore(runners.bucket)
        run_id = submit_run(store, request(max_failures=0))
        first = runners.start()
        eventually(lambda: log_of(store, run_id).lineage, what="training")
        below = descendants(first.pid)
        first.kill()
        eventually(lambda: not any(map(is_alive, below)), what="the end of its drivers")
        assert list(runners.temporary.iterdir()) != []
        second = runners.start()
        eventually(lambda: state(store, run_id) is RunState.FINALIZING, what="the end of training")
        assert runners.stop(second) == 0

        assert list(runners.temporary.iterdir()) == []
    assert below != {}
    assert reasons(store, run_id) == ["runner_lost"]
    assert starts(store, run_id)[-1] is not None


def test_f28_a_runner_under_load_ends_within_ten_seconds(tmp_path: Path) -> None:
    """F28: SIGTERM with deaf drivers in every place: status 0, in time, and nothing left."""
    with ScriptedRunners(tmp_path, "hang-deaf") as runners:
        store = LocalStore(runners.bucket)
        run_ids = [submit_run(store, request()) for _ in range(4)]
        runner = runners.start()
        eventually(
            lambda: all(state(store, run_id) is RunState.STARTING for run_id in run_ids), what="the start of all"
        )
        below = descendants(runner.pid)
        began_at = time.monotonic()

        assert runners.stop(runner) == 0

        assert time.monotonic() - began_at < 10
        assert not any(map(is_alive, below))
        assert list(runners.temporary.iterdir()) == []
    assert [reasons(store, run_id) for run_id in run_ids] == [["runner_stopped"]] * 4
