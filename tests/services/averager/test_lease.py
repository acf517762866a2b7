"""Who works on a run: one averager at a time as a rule, and none for ever."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

import pytest

from services.averager.lease import LIFETIME_S, RENEW_EVERY_S, Lease, Worker
from support.runs import HandmadeRun
from wa_core import layout
from wa_core.clock import ManualClock
from wa_core.records import Heartbeat
from wa_core.store.memory import MemoryStore


class Elsewhere(Worker):
    """An averager on another machine, whose processes cannot be asked for."""

    def __init__(self, host: str) -> None:
        super().__init__()
        self.host = host
        self.name = f"{host}/1/0"


@pytest.fixture
def store() -> MemoryStore:
    """A bucket."""
    return MemoryStore()


@pytest.fixture
def run_id(store: MemoryStore) -> str:
    """A run in it."""
    return HandmadeRun(store, averages={}).run_id


def lease(store: MemoryStore, run_id: str, host: str, clock: ManualClock) -> Lease:
    """One machine's view."""
    return Lease(store, run_id, worker=Elsewhere(host), clock=clock)


def test_the_first_takes_the_run_and_the_second_leaves_it(store: MemoryStore, run_id: str) -> None:
    """While the holder renews its note, nobody else takes the run, for however long."""
    clock = ManualClock()
    first, second = lease(store, run_id, "a", clock), lease(store, run_id, "b", clock)
    for _ in range(20):
        assert first.hold()
        assert not second.hold()
        clock.advance(RENEW_EVERY_S)


def test_a_silent_holder_is_followed(store: MemoryStore, run_id: str) -> None:
    """A note that does not change for a lifetime is nobody's any more."""
    clock = ManualClock()
    assert lease(store, run_id, "a", clock).hold()
    second = lease(store, run_id, "b", clock)
    assert not second.hold()
    clock.advance(LIFETIME_S + 1)
    assert second.hold()


def test_a_released_run_is_free_at_once(store: MemoryStore, run_id: str) -> None:
    """An averager that ends well lets the next one in without a wait."""
    clock = ManualClock()
    first = lease(store, run_id, "a", clock)
    first.hold()
    first.release()
    assert lease(store, run_id, "b", clock).hold()


@pytest.mark.parametrize("hours", [-1, 1])
def test_f24_a_clock_that_is_an_hour_off_keeps_nobody_away(store: MemoryStore, run_id: str, hours: int) -> None:
    """F24: a dead holder whose clock was wrong either way is followed after one lifetime, no later."""
    clock = ManualClock()
    at = clock.now() + timedelta(hours=hours)
    store.put(layout.heartbeat(run_id, "averager"), Heartbeat(who="z/1/0", at=at).model_dump_json().encode())
    second = lease(store, run_id, "b", clock)
    second.hold()
    clock.advance(LIFETIME_S + 1)
    assert second.hold()


def test_f24_a_holder_whose_clock_jumps_ahead_stays_the_holder(store: MemoryStore, run_id: str) -> None:
    """F24: the other one goes by whether the note changes, not by the time in it."""
    ahead, right = ManualClock(), ManualClock()
    first, second = lease(store, run_id, "a", ahead), lease(store, run_id, "b", right)
    first.hold()
    ahead.jump(3600)
    for _ in range(20):
        for clock in (ahead, right):
            clock.advance(RENEW_EVERY_S)
        assert first.hold()
        assert not second.hold()


def test_a_dead_process_of_this_machine_is_followed_at_once(store: MemoryStore, run_id: str) -> None:
    """Where the holder's process can be asked for and is gone, nobody waits for its note to grow old."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    worker = Worker()
    dead = Heartbeat(who=f"{worker.host}/{child.pid}/0", at=ManualClock().now())
    store.put(layout.heartbeat(run_id, "averager"), dead.model_dump_json().encode())
    assert Lease(store, run_id, worker=worker, clock=ManualClock()).hold()


def test_an_unreadable_note_is_no_obstacle(store: MemoryStore, run_id: str) -> None:
    """The note is advice: a damaged one is written over."""
    store.put(layout.heartbeat(run_id, "averager"), b"{")
    assert lease(store, run_id, "a", ManualClock()).hold()


def test_a_held_run_costs_no_request_until_it_is_time(store: MemoryStore, run_id: str) -> None:
    """Between renewals the holder asks the store nothing."""
    clock = ManualClock()
    held = lease(store, run_id, "a", clock)
    held.hold()
    store.delete(layout.heartbeat(run_id, "averager"))
    assert held.hold()
    assert [info.key for info in store.list(layout.heartbeat(run_id, "averager"))] == []
