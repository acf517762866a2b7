from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from support.faulty import Fault, FaultyStore
from support.logs import RECIPE, open_log, submitted
from wa_core import layout
from wa_core.catalog.runs import add_average, list_active, requested_averages, submit
from wa_core.clock import ManualClock
from wa_core.errors import ConflictError, RunNotFoundError, StoreUnavailableError
from wa_core.records import (
    AttemptStarted,
    AverageAdded,
    AverageRequest,
    Cancelled,
    Failed,
    LogEntry,
    RunRequest,
    RunState,
    Succeeded,
)
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from wa_core.store.base import ObjectStore

CLOCK = ManualClock()
EMA = AverageRequest(name="ema", rule="ema:half_life=60")


def ended_run(store: ObjectStore, entry: LogEntry) -> str:
    """A run that has ended with `entry`, and that its averager has forgotten."""
    run_id = submitted(store)
    log = open_log(store, run_id)
    log.append(AttemptStarted(runner_id="r"))
    log.append(entry)
    store.delete(layout.active_marker(run_id))
    return run_id


class MarkerTaker(MemoryStore):
    """A store in which an averager takes the active marker away just before a log entry is created."""

    def create(self, key: str, body: bytes) -> None:
        """Create, after the averager."""
        for run_id in list_active(self):
            self.delete(layout.active_marker(run_id))
        super().create(key, body)


@pytest.mark.parametrize("end", [Succeeded(), Failed(reason="x"), Cancelled()], ids=lambda end: str(end.kind))
def test_an_ended_run_takes_an_average_and_nothing_else(end: LogEntry) -> None:
    """An average can be added after the end; the run's state stays, and an averager finds the run again."""
    store = MemoryStore()
    run_id = ended_run(store, end)
    log = open_log(store, run_id)
    log.refresh()
    before = log.state

    added = add_average(store, run_id, EMA, clock=CLOCK)

    log.refresh()
    assert before.is_terminal
    assert (added.state, added.attempt, log.state) == (before, 1, before)
    assert log.entries[-1] == added
    assert list(list_active(store)) == [run_id]


def test_a_running_run_takes_an_average() -> None:
    """An average that is added mid-run changes nothing about the attempt."""
    store = MemoryStore()
    run_id = submitted(store)
    log = open_log(store, run_id)
    log.append(AttemptStarted(runner_id="r"))

    added = add_average(store, run_id, EMA, clock=CLOCK)

    assert (added.state, added.attempt, added.seq) == (RunState.STARTING, 1, 3)


def test_submitted_and_added_averages_in_order() -> None:
    """A run's averages are those submitted, then those added, in the order of the log."""
    store = MemoryStore()
    swa = AverageRequest(name="swa", rule="swa")
    spec = submit(store, RunRequest(recipe=RECIPE, averages=[swa]), clock=CLOCK)
    late = AverageRequest(name="late", rule="window:last=3", accumulator_dtype="float32")
    for wanted in (EMA, late):
        add_average(store, spec.run_id, wanted, clock=CLOCK)

    log = open_log(store, spec.run_id)
    log.refresh()
    assert requested_averages(spec, log.entries) == [swa, EMA, late]


def test_the_first_of_a_name_counts() -> None:
    """Should a log hold two averages of one name, every reader takes the first."""
    store = MemoryStore()
    spec = submit(store, RunRequest(recipe=RECIPE, averages=[EMA]), clock=CLOCK)
    other = AverageAdded(average=AverageRequest(name="ema", rule="swa"))

    assert requested_averages(spec, [other, other]) == [EMA]


@pytest.mark.parametrize("name", ["swa", "ema"])
def test_a_name_that_is_taken_is_refused(name: str) -> None:
    """A name that was submitted, or added before, is refused with `average_exists` and adds nothing."""
    store = MemoryStore()
    swa = AverageRequest(name="swa", rule="swa")
    run_id = submit(store, RunRequest(recipe=RECIPE, averages=[swa]), clock=CLOCK).run_id
    add_average(store, run_id, EMA, clock=CLOCK)

    with pytest.raises(ConflictError, match=f"'{name}'") as caught:
        add_average(store, run_id, AverageRequest(name=name, rule="swa"), clock=CLOCK)

    log = open_log(store, run_id)
    log.refresh()
    assert caught.value.code == "average_exists"
    assert len(log.entries) == 2


def test_of_several_at_once_one_wins() -> None:
    """Of eight that add one name at the same moment, one succeeds and seven are told that it exists."""
    store = MemoryStore()
    run_id = submitted(store)

    def add(_: int) -> str:
        try:
            add_average(store, run_id, EMA, clock=CLOCK)
        except ConflictError as error:
            return error.code
        return "added"

    with ThreadPoolExecutor(8) as pool:
        answers = sorted(pool.map(add, range(8)))

    assert answers == ["added", *["average_exists"] * 7]


def test_an_averager_that_was_just_finishing_looks_again() -> None:
    """When an averager takes the active marker away before the entry is there, the marker comes back."""
    store = MarkerTaker()
    run_id = ended_run(store, Succeeded())

    add_average(store, run_id, EMA, clock=CLOCK)

    assert list(list_active(store)) == [run_id]


def test_no_entry_without_a_marker() -> None:
    """When the store goes away before the marker is written, nothing has been added."""
    inner = MemoryStore()
    run_id = ended_run(inner, Succeeded())
    store = FaultyStore(inner)
    store.next_call("put", Fault.DROP_REQUEST)

    with pytest.raises(StoreUnavailableError):
        add_average(store, run_id, EMA, clock=CLOCK)

    log = open_log(inner, run_id)
    log.refresh()
    assert isinstance(log.entries[-1], Succeeded)


def test_an_unknown_run_gets_no_marker() -> None:
    """Adding to a run that does not exist is refused, and leaves nothing behind."""
    store = MemoryStore()

    with pytest.raises(RunNotFoundError):
        add_average(store, "0" * 26, EMA, clock=CLOCK)

    assert list(store.list("")) == []
