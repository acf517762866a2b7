"""The runner: claims, recovery, cancel, take-over. Drivers are scripted processes; everything else is real."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from services.trainer.held import Graces
from services.trainer.identity import is_provably_gone, new_runner_id
from services.trainer.runner import Runner
from support.faulty import FaultyStore
from support.ticked_runner import MakeRunner, kinds, tick_until
from support.training import digits_request, log_of, start_attempt, submit_run
from wa_core import layout
from wa_core.catalog.runs import add_average
from wa_core.clock import ManualClock, SystemClock
from wa_core.errors import StoreUnavailableError
from wa_core.records import (
    AttemptFailed,
    AttemptStarted,
    AverageRequest,
    CancelRequested,
    CheckpointCommitted,
    FileRef,
    Heartbeat,
    RunState,
    Scaling,
)

if TYPE_CHECKING:
    from wa_core.store.local import LocalStore


def test_a_queued_run_is_claimed_and_trained(store: LocalStore, make_runner: MakeRunner) -> None:
    """A waiting run gets an attempt and a driver, and its queue marker goes."""
    run_id = submit_run(store, digits_request())
    runner = make_runner("finish")

    tick_until(runner, lambda: log_of(store, run_id).state is RunState.FINALIZING)

    assert kinds(store, run_id) == ["submitted", "attempt_started", "training_finished"]
    assert list(store.list(layout.QUEUE)) == []
    assert list(store.list(layout.ACTIVE)) != []


def test_runs_wait_while_the_runner_is_full(store: LocalStore, make_runner: MakeRunner) -> None:
    """No more than `max_concurrent_runs` are taken, the most urgent ones first."""
    later = submit_run(store, digits_request())
    urgent = submit_run(store, digits_request().model_copy(update={"priority": 1}))
    runner = make_runner("hang")

    runner.tick()
    runner.tick()

    assert log_of(store, urgent).state is RunState.STARTING
    assert log_of(store, later).state is RunState.QUEUED


def test_a_dead_driver_is_replaced_by_an_attempt_from_the_last_checkpoint(
    store: LocalStore, make_runner: MakeRunner
) -> None:
    """F16: a driver that dies without a word is followed by a new attempt that resumes at the last checkpoint."""
    run_id = submit_run(store, digits_request())
    runner = make_runner("save-then-die,save-then-die,finish")

    tick_until(runner, lambda: log_of(store, run_id).state is RunState.FINALIZING)

    entries = log_of(store, run_id).entries
    starts = [entry for entry in entries if isinstance(entry, AttemptStarted)]
    saved = [entry.seq for entry in entries if entry.kind == "checkpoint"]
    assert [start.resumed_from for start in starts] == [None, *saved]
    assert [entry.reason for entry in entries if entry.kind == "attempt_failed"] == ["driver_died"] * 2


def test_65_66_no_attempt_grows_from_a_checkpoint_that_no_average_folds(
    store: LocalStore, make_runner: MakeRunner
) -> None:
    """After a record that cannot be read, and one that points out of the run, the one before them is resumed."""
    run_id = submit_run(store, digits_request())
    start_attempt(store, run_id)
    log = log_of(store, run_id)
    sound, foreign, unreadable = (
        log.append(CheckpointCommitted(step=step, files={layout.MODEL_FILE: ref}, spec_digest="0" * 64))
        for step, ref in enumerate(
            [ref_in(store, run_id), ref_in(store, "0" * 26), ref_in(store, run_id)], start=1
        )
    )
    key = layout.log_entry(run_id, unreadable.seq)
    store.put(key, store.get(key).replace(b'"format":1', b'"format":2'))
    log.append(AttemptFailed(reason="test"))

    runner = make_runner("finish", lost_after_s=0.3)
    tick_until(runner, lambda: log_of(store, run_id).state is RunState.FINALIZING)

    starts = [entry for entry in log_of(store, run_id).entries if isinstance(entry, AttemptStarted)]
    assert starts[-1].resumed_from == sound.seq
    assert foreign.seq < unreadable.seq


def ref_in(store: LocalStore, run_id: str) -> FileRef:
    """Weights in a checkpoint of a run."""
    prefix = layout.checkpoint_prefix(run_id, attempt=1, step=1, nonce=layout.new_nonce())
    store.put(prefix + layout.MODEL_FILE, b"")
    return FileRef(key=prefix + layout.MODEL_FILE, size_bytes=0, sha256="0" * 64)


def test_a_run_fails_after_max_failures(store: LocalStore, make_runner: MakeRunner) -> None:
    """One failure more than `max_failures` ends the run with the reason of the last one."""
    run_id = submit_run(store, digits_request(max_failures=1))
    runner = make_runner("user_code")

    tick_until(runner, lambda: log_of(store, run_id).state is RunState.FAILED)

    last = log_of(store, run_id).entries[-1]
    assert (last.kind, last.reason, last.message) == ("failed", "user_code", "as the test wanted")
    assert kinds(store, run_id).count("attempt_failed") == 2


def test_a_hopeless_failure_is_not_tried_again(store: LocalStore, make_runner: MakeRunner) -> None:
    """A run whose config no recipe takes fails at once, with that reason."""
    run_id = submit_run(store, digits_request(max_failures=5))
    runner = make_runner("invalid_config")

    tick_until(runner, lambda: log_of(store, run_id).state is RunState.FAILED)

    assert kinds(store, run_id).count("attempt_started") == 1
    assert log_of(store, run_id).entries[-1].reason == "invalid_config"


def test_a_queued_run_is_cancelled_at_once_even_when_the_runner_is_full(
    store: LocalStore, make_runner: MakeRunner
) -> None:
    """A run that never started needs no driver to be cancelled."""
    busy = submit_run(store, digits_request())
    runner = make_runner("hang")
    runner.tick()
    run_id = submit_run(store, digits_request())
    log_of(store, run_id).append(CancelRequested())

    runner.tick()

    assert log_of(store, run_id).state is RunState.CANCELLED
    assert log_of(store, busy).state is RunState.STARTING
    assert list(store.list(layout.QUEUE)) == []


@pytest.mark.parametrize("verb", ["hang", "hang-deaf"])
def test_a_driver_that_ignores_a_cancel_is_made_to_stop(
    store: LocalStore, make_runner: MakeRunner, verb: str
) -> None:
    """A cancelled run ends: first the driver is left alone, then interrupted, then killed."""
    run_id = submit_run(store, digits_request())
    runner = make_runner(verb, graces=Graces(cancel_s=0.3, interrupt_s=0.5, terminate_s=0.3))
    runner.tick()
    beat(store, run_id, attempt=1)
    (held,) = runner.held.values()
    log_of(store, run_id).append(CancelRequested())

    tick_until(runner, lambda: log_of(store, run_id).state is RunState.CANCELLED)

    assert not held.child.is_alive
    assert kinds(store, run_id)[-1] == "cancelled"


def test_a_cancel_while_workers_start_is_not_waited_for(store: LocalStore, make_runner: MakeRunner) -> None:
    """Before this attempt's workers have shown up there are no weights to save, so the driver is stopped soon."""
    run_id = submit_run(store, digits_request())
    graces = Graces(cancel_s=600.0, start_cancel_s=0.1, interrupt_s=0.5)
    runner = make_runner("hang", graces=graces)
    runner.tick()
    beat(store, run_id, attempt=0)  # an older attempt's
    log_of(store, run_id).append(CancelRequested())

    tick_until(runner, lambda: log_of(store, run_id).state is RunState.CANCELLED)

    assert kinds(store, run_id)[-1] == "cancelled"


def beat(store: LocalStore, run_id: str, *, attempt: int) -> None:
    """What the workers of an attempt write while they train."""
    body = Heartbeat(who="trainer", at=SystemClock().now(), attempt=attempt).model_dump_json().encode()
    store.put(layout.heartbeat(run_id, "trainer"), body)


def test_a_lost_runner_costs_the_run_no_failure(store: LocalStore, make_runner: MakeRunner) -> None:
    """F16: a run whose runner's heartbeat stands still is taken over, even with `max_failures` 0."""
    run_id = submit_run(store, digits_request(max_failures=0))
    start_attempt(store, run_id)
    beat = Heartbeat(who="runner", at=SystemClock().now())
    store.put(layout.heartbeat(run_id, "runner"), beat.model_dump_json().encode())
    runner = make_runner("finish", lost_after_s=0.3)

    tick_until(runner, lambda: log_of(store, run_id).state is RunState.FINALIZING)

    failed = [entry for entry in log_of(store, run_id).entries if entry.kind == "attempt_failed"]
    assert [entry.reason for entry in failed] == ["runner_lost"]


def test_a_living_runner_keeps_its_run(store: LocalStore, make_runner: MakeRunner) -> None:
    """Two runners on one bucket: the heartbeat of the first keeps the second one away."""
    run_id = submit_run(store, digits_request())
    clock = ManualClock(SystemClock().now())
    first = make_runner("hang", heartbeat_interval_s=0.05, clock=clock)
    second = make_runner("finish", lost_after_s=1.0, clock=clock)
    first.tick()

    for _ in range(8):
        clock.advance(0.6)
        first.tick()
        second.tick()

    assert kinds(store, run_id) == ["submitted", "attempt_started"]


def test_a_store_that_was_away_makes_no_runner_lost(store: LocalStore, make_runner: MakeRunner) -> None:
    """A heartbeat that stood still because nobody could write it is watched anew before anything is concluded."""
    run_id = submit_run(store, digits_request())
    start_attempt(store, run_id)
    runner = make_runner("finish", lost_after_s=10.0)
    faulty, clock = FaultyStore(store), ManualClock()
    runner = Runner(faulty, runner.config, clock, totals=dict)
    runner.tick()

    faulty.is_away = True
    with pytest.raises(StoreUnavailableError):
        runner.tick()
    clock.advance(60.0)
    faulty.is_away = False
    runner.tick()

    assert kinds(store, run_id) == ["submitted", "attempt_started"]


def test_a_heartbeat_of_another_version_is_one(store: LocalStore, make_runner: MakeRunner) -> None:
    """What cannot be read as a heartbeat still shows by changing that somebody is there, and troubles nobody."""
    run_id = submit_run(store, digits_request())
    start_attempt(store, run_id)
    clock = ManualClock()
    runner = Runner(store, make_runner("finish", lost_after_s=10.0).config, clock, totals=dict)

    for number in range(5):
        store.put(layout.heartbeat(run_id, "runner"), f'{{"number": {number}}}'.encode())
        runner.tick()
        clock.advance(6.0)

    assert kinds(store, run_id) == ["submitted", "attempt_started"]


def test_f15_an_attempt_that_no_longer_fits_the_cluster_is_followed_by_a_smaller_one(
    store: LocalStore, make_runner: MakeRunner
) -> None:
    """F15: nodes lost before the workers are there end the attempt, uncharged; the next has what fits."""
    request = digits_request(max_failures=0)
    run_id = submit_run(store, request.model_copy(update={"scaling": Scaling(num_workers=3, min_workers=1)}))
    cluster = {"CPU": 3.0}
    config = make_runner("hang,finish", heartbeat_interval_s=0.05).config
    runner = Runner(store, config, SystemClock(), totals=lambda: cluster)
    tick_until(runner, lambda: log_of(store, run_id).state is RunState.STARTING)

    cluster["CPU"] = 2.0
    tick_until(runner, lambda: log_of(store, run_id).state is RunState.FINALIZING and not runner.held)

    entries = log_of(store, run_id).entries
    failed = [entry for entry in entries if isinstance(entry, AttemptFailed)]
    assert [entry.num_workers for entry in entries if isinstance(entry, AttemptStarted)] == [3, 2]
    assert [entry.reason for entry in failed] == ["nodes_lost"]
    assert failed[0].message == "3 workers need 3 CPUs, and the cluster has lost nodes and now has 2"


def test_f18_an_older_runner_gives_up_a_run_that_was_taken_over(
    store: LocalStore, make_runner: MakeRunner
) -> None:
    """F18: once a newer attempt has started, the driver of the older one is killed and nothing else is said."""
    run_id = submit_run(store, digits_request())
    runner = make_runner("hang")
    runner.tick()
    (held,) = runner.held.values()

    start_attempt(store, run_id)
    runner.tick()

    assert not held.child.is_alive
    assert runner.held == {}
    assert kinds(store, run_id)[-1] == "attempt_started"


def test_a_stopped_runner_leaves_its_run_to_the_next_at_once(store: LocalStore, make_runner: MakeRunner) -> None:
    """F28: shutting down kills the drivers, says so in the log, and the next runner need not wait.

    An average that is added meanwhile does not hide it.
    """
    run_id = submit_run(store, digits_request(max_failures=0))
    first = make_runner("hang")
    first.tick()
    (held,) = first.held.values()

    first.shut_down()

    assert not held.child.is_alive
    assert log_of(store, run_id).entries[-1].reason == "runner_stopped"
    add_average(store, run_id, AverageRequest(name="late", rule="swa"), clock=SystemClock())
    second = make_runner("finish", lost_after_s=600.0)
    tick_until(second, lambda: log_of(store, run_id).state is RunState.FINALIZING)


def test_a_runner_id_tells_whether_its_process_is_gone() -> None:
    """On the same machine a dead process is known at once; of other machines nothing is concluded."""
    mine = new_runner_id()
    place = mine.rsplit("/", 2)[0]

    assert is_provably_gone(f"{place}/{os.getpid()}/other")
    assert not is_provably_gone(f"{place}/1/x")
    assert is_provably_gone(f"{place}/4194305/x")  # beyond the largest process id of Linux
    assert not is_provably_gone("elsewhere/1/4194305/x")
