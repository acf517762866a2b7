"""Landscapes from request to result, with a real child process; who works on one, and what its death costs."""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from services.averager.idle_worker import LIFETIME_S, LOOK_EVERY_S, MAX_ATTEMPTS
from services.averager.landscape_job import Limits
from services.averager.landscaper import Landscaper
from services.averager.lease import Worker
from services.averager.scratch import Scratch
from support.assessing import wait_for
from support.averaging import averager
from support.descendants import is_alive
from support.landscapes import CHILD, bowl, point, published
from support.patience import eventually
from wa_core import layout
from wa_core.catalog.jobs import list_wanted
from wa_core.catalog.landscapes import Landscapes
from wa_core.catalog.sweeper import Sweeper
from wa_core.clock import ManualClock, SystemClock
from wa_core.errors import StoreAuthError
from wa_core.records import JobProgress, LandscapeRequest
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.runs import HandmadeRun
    from wa_core.records import LandscapeResult

    Build = Callable[..., Landscaper]

STEPS = (10, 20, 30)
AVERAGE = sum(point(step) for step in STEPS) / len(STEPS)


@pytest.fixture
def store() -> MemoryStore:
    """A bucket."""
    return MemoryStore()


@pytest.fixture
def build(store: MemoryStore, tmp_path: Path) -> Iterator[Build]:
    """Makes landscapers of the bowl; closed in the end, and nothing must be left of their work."""
    made: list[Landscaper] = []
    scratch = Scratch(tmp_path)

    def build(**options: Any) -> Landscaper:
        usual = {"store": store, "clock": SystemClock(), "scratch": scratch, "command": CHILD}
        landscaper = Landscaper(**(usual | options))
        made.append(landscaper)
        return landscaper

    yield build
    for landscaper in made:
        landscaper.close()
    assert not list(scratch.folder.glob("landscape-*"))
    scratch.close()


def ask(run: HandmadeRun, kind: str = "line", points: int = 7) -> str:
    """Ask for a landscape."""
    wanted = LandscapeRequest.model_validate({"kind": kind, "points": points})
    return Landscapes(run.store, run.run_id, "swa").ask(wanted, clock=SystemClock()).landscape_id


def known(run: HandmadeRun) -> Landscapes:
    """What the bucket has of them."""
    return Landscapes(run.store, run.run_id, "swa")


def result(
    run: HandmadeRun, landscape_id: str, landscaper: Landscaper, *, timeout_s: float = 120.0
) -> LandscapeResult:
    """What comes of a landscape, while an averager with nothing else to do works on it."""

    def worked() -> LandscapeResult | None:
        landscaper.work(is_idle=True)
        return None if landscaper.is_busy else known(run).result(landscape_id)

    found = eventually(worked, timeout_s=timeout_s, what="a result")
    assert found is not None
    return found


def test_a_line_is_worked_out(store: MemoryStore, build: Build) -> None:
    """From the newest raw weights to the average, with the real child: losses, markers, and no marker left."""
    run = published(store, STEPS)
    landscape_id = ask(run, points=31)

    found = result(run, landscape_id, build())

    assert (found.state, found.code, found.generation) == ("succeeded", None, 1)
    expected = [bowl((1 - t) * point(30) + t * AVERAGE) for t in found.x]
    assert found.heldout == [pytest.approx(expected, rel=1e-5)]
    assert found.train == [pytest.approx([2 * loss for loss in expected], rel=1e-5)]
    assert [(one.label, one.step, one.x) for one in found.markers] == [("raw", 30, 0.0), ("average", 30, 1.0)]
    assert [one.y for one in found.markers] == pytest.approx([bowl(point(30)), bowl(AVERAGE)], rel=1e-5)
    assert list(list_wanted(store, "landscapes")) == []
    progress = known(run).progress(landscape_id)
    assert progress is not None
    assert progress.attempt == 1


def test_a_plane_is_worked_out(store: MemoryStore, build: Build) -> None:
    """Through the oldest kept checkpoint in the average, the newest raw one and the average."""
    run = published(store, STEPS)
    gone = run.log.lineage[0]
    store.delete(gone.files[layout.MODEL_FILE].key)

    found = result(run, ask(run, "plane", points=4), build())

    assert [(one.label, one.step) for one in found.markers] == [("first", 20), ("raw", 30), ("average", 30)]
    assert [one.loss for one in found.markers] == pytest.approx(
        [bowl(point(20)), bowl(point(30)), bowl(AVERAGE)], rel=1e-5
    )
    assert [len(row) for row in found.heldout] == [4] * 4


def test_folding_comes_first(store: MemoryStore, build: Build) -> None:
    """While there is something to fold, none is begun; and a tick never waits for one."""
    run = published(store, STEPS)
    ask(run)
    landscaper = build()

    landscaper.work(is_idle=False)

    assert not landscaper.is_busy
    worker = averager(store, idle_workers=[landscaper])
    worker.tick()
    assert landscaper.is_busy


class LockableStore(MemoryStore):
    """A store that refuses to list when it is told to."""

    is_locked = False

    def list(self, prefix: str, **options: Any) -> Any:
        """Refuse, or list."""
        if self.is_locked:
            raise StoreAuthError("the store refuses access key 'wa'")
        return super().list(prefix, **options)


def test_a_refusal_between_two_leaves_folding_alone(build: Build) -> None:
    """A store that refuses to say what is wanted is asked again later; the job before is not begun anew."""
    run = published(store := LockableStore(), STEPS)
    landscaper = build(store=store, clock=(clock := ManualClock()))
    assert result(run, ask(run), landscaper).state == "succeeded"
    clock.advance(LOOK_EVERY_S)

    store.is_locked = True
    landscaper.work(is_idle=True)

    assert not landscaper.is_busy
    store.is_locked = False
    clock.advance(30 * LOOK_EVERY_S)
    assert result(run, ask(run), landscaper).state == "succeeded"


def test_a_killed_child_costs_an_attempt_and_no_landscape(
    store: MemoryStore, build: Build, tmp_path: Path
) -> None:
    """SIGKILL of the landscape process in the middle: the landscape is begun again, and done."""
    run = published(store, STEPS, marks=str(tmp_path / "pid"))
    landscape_id = ask(run)
    landscaper = build()
    landscaper.work(is_idle=True)

    os.kill(wait_for(tmp_path / "pid"), signal.SIGKILL)

    assert result(run, landscape_id, landscaper).state == "succeeded"
    assert known(run).newest_attempt(landscape_id) == 2


def test_a_child_that_always_dies_is_a_failure(store: MemoryStore, build: Build) -> None:
    """After the last attempt the landscape fails, and says how its process ended."""
    run = published(store, STEPS)
    landscape_id = ask(run)

    found = result(run, landscape_id, build(command=("/bin/sh", "-c", "exit 7")))

    assert (found.state, found.code) == ("failed", "landscape_died")
    assert "exit code 7" in found.message or "could not be asked" in found.message
    assert known(run).newest_attempt(landscape_id) == MAX_ATTEMPTS
    assert list(list_wanted(store, "landscapes")) == []


def test_closing_ends_the_child_and_leaves_the_rest_to_others(
    store: MemoryStore, build: Build, tmp_path: Path
) -> None:
    """F28: an averager that stops takes its child with it, and another one goes on at once."""
    run = published(store, STEPS, marks=str(tmp_path / "pid"))
    landscape_id = ask(run)
    landscaper = build()
    landscaper.work(is_idle=True)
    pid = wait_for(tmp_path / "pid")

    landscaper.close()

    assert not is_alive(pid)
    assert result(run, landscape_id, build(clock=ManualClock())).state == "succeeded"


def taken(run: HandmadeRun, landscape_id: str, who: str, *, attempt: int = 1, progress: float = 0.5) -> None:
    """Another averager's attempt, and its sign of life."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    if known(run).newest_attempt(landscape_id) < attempt:
        known(run).begin(landscape_id, attempt=attempt, at=now, who=who)
    known(run).report(landscape_id, JobProgress(attempt=attempt, who=who, at=now, progress=progress))


def test_a_silent_worker_is_succeeded(store: MemoryStore, build: Build) -> None:
    """One whose progress does not change for a lifetime, by the reader's own clock, is gone; before, it is not."""
    run = published(store, STEPS)
    landscape_id = ask(run)
    taken(run, landscape_id, "elsewhere/1/ab")
    landscaper = build(clock=(clock := ManualClock()))

    landscaper.work(is_idle=True)
    clock.advance(LIFETIME_S - 1)
    landscaper.work(is_idle=True)
    taken(run, landscape_id, "elsewhere/1/ab", progress=0.6)
    clock.advance(LOOK_EVERY_S)
    landscaper.work(is_idle=True)
    clock.advance(LIFETIME_S - 1)
    landscaper.work(is_idle=True)
    assert known(run).newest_attempt(landscape_id) == 1

    clock.advance(LOOK_EVERY_S)

    assert result(run, landscape_id, landscaper).state == "succeeded"
    assert known(run).newest_attempt(landscape_id) == 2


def test_a_dead_worker_of_this_machine_is_succeeded_at_once(store: MemoryStore, build: Build) -> None:
    """Nobody waits for a process that is known to be gone."""
    run = published(store, STEPS)
    landscape_id = ask(run)
    taken(run, landscape_id, f"{Worker().host}/4194999/ab")

    assert result(run, landscape_id, build(clock=ManualClock())).state == "succeeded"


def test_three_workers_without_a_result_are_enough(store: MemoryStore, build: Build) -> None:
    """A landscape that takes its averagers down with it ends as a failure, and is not tried for ever."""
    run = published(store, STEPS)
    landscape_id = ask(run)
    taken(run, landscape_id, f"{Worker().host}/4194999/ab", attempt=MAX_ATTEMPTS)
    landscaper = build()
    landscaper.work(is_idle=True)

    found = known(run).result(landscape_id)

    assert found is not None
    assert (found.state, found.code) == ("failed", "landscape_abandoned")


def test_f3_a_zombie_stops_when_another_has_taken_over(store: MemoryStore, build: Build, tmp_path: Path) -> None:
    """Whoever sees a newer attempt than its own ends its child and says nothing more."""
    run = published(store, STEPS, marks=str(tmp_path / "pid"), mood="hang")
    landscape_id = ask(run)
    landscaper = build()
    landscaper.work(is_idle=True)
    pid = wait_for(tmp_path / "pid")

    taken(run, landscape_id, "elsewhere/1/ab", attempt=2, progress=0.75)

    eventually(lambda: not landscaper.is_busy, what="giving up")
    assert not is_alive(pid)
    assert known(run).result(landscape_id) is None
    progress = known(run).progress(landscape_id)
    assert progress is not None
    assert (progress.attempt, progress.progress) == (2, 0.75)


def test_limits_are_failures_with_codes(store: MemoryStore, build: Build, tmp_path: Path) -> None:
    """A landscape that takes too long, or too much memory, is ended and says which setting would help."""
    run = published(store, STEPS, marks=str(tmp_path / "pid"), mood="hang")

    slow = result(run, ask(run), build(limits=Limits(time_s=0.5)))
    fat = result(run, ask(run), build(limits=Limits(memory_bytes=1 << 20)))

    assert (slow.code, fat.code) == ("landscape_timeout", "landscape_out_of_memory")
    assert "WA_LANDSCAPE_TIME_LIMIT_S" in slow.message
    assert "WA_LANDSCAPE_MEMORY_MB" in fat.message


def test_without_checkpoints_there_is_nothing_to_go_through(store: MemoryStore, build: Build) -> None:
    """What is gone from the bucket is said: of a plane all but the newest, of a line all."""
    run = published(store, STEPS)
    *others, newest = [entry.files[layout.MODEL_FILE].key for entry in run.log.lineage]
    for key in others:
        store.delete(key)
    plane = result(run, ask(run, "plane"), build())
    line = result(run, ask(run), build())
    store.delete(newest)
    nothing = result(run, ask(run), build())

    assert (plane.code, line.state, nothing.code) == ("checkpoint_not_kept", "succeeded", "checkpoint_not_kept")
    assert "keep_last" in plane.message


def test_damaged_weights_are_a_failure(store: MemoryStore, build: Build) -> None:
    """F6: what is not what its record says is never measured."""
    run = published(store, STEPS)
    key = run.log.lineage[-1].files[layout.MODEL_FILE].key
    body = bytearray(store.get(key))
    body[-1] ^= 1
    store.put(key, bytes(body))

    assert result(run, ask(run), build()).code == "digest_mismatch"


def test_a_marker_without_a_request_is_ignored(store: MemoryStore, build: Build) -> None:
    """As a crash between the two leaves it; the next landscape is found all the same."""
    run = published(store, STEPS)
    store.put(layout.job_marker("landscapes", run.run_id, "swa", "0" * 26), b"{}")

    assert result(run, ask(run), build()).state == "succeeded"


def test_sweeps_leave_landscapes_alone(store: MemoryStore, build: Build) -> None:
    """F25: records of landscapes are records; no sweep takes them for orphans, however old they are."""
    run = published(store, STEPS)
    result(run, ask(run), build())
    ask(run)

    report = Sweeper(store, run.run_id, clock=SystemClock()).sweep(is_dry_run=True, is_whole=True)

    ours = [key for key in report.verdicts if "/landscapes/" in key]
    assert len(ours) == 5  # two requests, an attempt, its progress and its result
    assert not set(ours) & set(report.doomed)
