"""Retention carried out: served files, orphans, clocks, and sweeps that are late, bounded or repeated."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from support.histories import MiniatureRun, exists
from support.retention import NO_GRACE, TENS, new_run, states_left, steps_left, sweep, train
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.catalog.files import put_file
from wa_core.catalog.retention import Delete, Grace, Keep, plan
from wa_core.catalog.survey import Survey
from wa_core.catalog.sweeper import Sweeper, fetch_store_time
from wa_core.records import Assessment, AssessmentRecord, BatchNormSummary, CheckpointPolicy, Evaluation
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.seaweed import Seaweed


def assess(run: MiniatureRun, number: int, *, loss: float, raw: float, step: int) -> dict[str, str]:
    """Serve a generation, and return its files' keys."""
    generations = Generations(run.store, run.run_id, "swa")
    nonce = layout.new_nonce()
    files = {
        name: put_file(run.store, layout.blob(run.run_id, "swa", nonce=nonce, file=name), b"served")
        for name in (layout.MODEL_FILE, layout.PICKLE_FILE)
    }
    assessment = Assessment(
        raw=Evaluation(step=step, metrics={"loss": raw}),
        averaged=Evaluation(step=step, metrics={"loss": loss}),
        batchnorm=BatchNormSummary(status="skipped"),
    )
    record = AssessmentRecord(
        run_id=run.run_id,
        name="swa",
        generation=number,
        at=run.clock.now(),
        files=files,
        assessment=assessment,
        best=generations.best_with(number, assessment),
    )
    generations.commit_assessment(record)
    return {name: ref.key for name, ref in files.items()}


def test_served_files_the_newest_and_the_best_stay() -> None:
    """Others go an hour after they were superseded, and not before: somebody may be downloading them."""
    run = new_run(CheckpointPolicy(keep_last=1))
    train(run, 10, 20, 30, 40)
    keys = [
        assess(run, number, loss=loss, raw=1.0, step=number * 10)[layout.MODEL_FILE]
        for number, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.0))
    ]

    sweep(run, Grace(download_s=3600))
    assert all(exists(run.store, key) for key in keys)

    sweep(run)
    assert [exists(run.store, key) for key in keys] == [False, True, False, True]


def test_the_best_are_told_by_held_out_loss_where_it_was_measured() -> None:
    """An assessment's raw loss counts; what the trainer recorded, of its own batches, does not beside it."""
    run = new_run(CheckpointPolicy(keep_best=1))
    train(run, 10, 20, 30, losses=(0.1, 0.5, 0.9))
    assess(run, 1, loss=1.0, raw=3.0, step=10)
    assess(run, 2, loss=1.0, raw=2.0, step=20)
    run.succeed()

    sweep(run)

    assert steps_left(run) == [20, 30]


def test_f24_ages_are_told_by_the_stores_clock(tmp_path: Path) -> None:
    """With the machine's clock two days ahead or behind, an orphan goes at a day old, and a young one stays."""
    store = LocalStore(tmp_path)
    run = new_run(CheckpointPolicy(keep_last=1), store)
    train(run, 10, 20)
    for jump_s in (172_800.0, -345_600.0):
        old, young = (layout.blob(run.run_id, "swa", nonce=layout.new_nonce(), file="x") for _ in range(2))
        store.put(old, b"")
        store.put(young, b"")
        yesterday = time.time() - 25 * 3600
        os.utime(tmp_path / old, (yesterday, yesterday))
        run.clock.jump(jump_s)

        sweep(run, Grace())

        assert (exists(store, old), exists(store, young)) == (False, True)


def test_unfinished_checkpoints_are_orphans(tmp_path: Path) -> None:
    """A folder whose log entry never came goes after the grace, in ended runs and in those that go on."""
    store = LocalStore(tmp_path)
    run = new_run(CheckpointPolicy(), store)
    train(run, 10)
    key = layout.checkpoint_prefix(run.run_id, attempt=1, step=20, nonce=layout.new_nonce()) + layout.MODEL_FILE
    store.put(key, b"half a checkpoint")

    verdict = sweep(run, Grace())[key]
    assert isinstance(verdict, Keep)
    assert verdict.is_temporary

    yesterday = time.time() - 25 * 3600
    os.utime(tmp_path / key, (yesterday, yesterday))
    run.succeed()
    sweep(run, Grace())
    assert not exists(store, key)
    assert steps_left(run) == [10]


def test_what_an_unreadable_generation_may_name_is_kept() -> None:
    """With a generation of another version, no file goes for want of a name."""
    run = new_run(CheckpointPolicy(keep_last=1))
    train(run, 10, 20, 30)
    key = layout.generation(run.run_id, "swa", 1)
    shadow = Generations(run.store, run.run_id, "swa").fetch(1).shadow
    assert shadow is not None
    run.store.put(key, run.store.get(key).replace(b'"format":1', b'"format":2'))

    verdicts = sweep(run)

    assert verdicts[shadow.key] == Keep("not looked up yet", is_temporary=True)


def test_records_never_go() -> None:
    """Of a whole run only files of checkpoints and averages may go, and everything is given a reason."""
    run = new_run(CheckpointPolicy(keep_last=1))
    train(run, *TENS)
    run.succeed()

    report = Sweeper(run.store, run.run_id, clock=run.clock, grace=NO_GRACE).sweep(is_whole=True)

    assert set(report.verdicts) == {info.key for info in run.store.list(layout.run_prefix(run.run_id))} | set(
        report.deleted
    )
    assert all(verdict.reason for verdict in report.verdicts.values())
    assert all(layout.blob_of(key) or layout.checkpoint_of(key) for key in report.deleted)
    assert report.is_settled
    assert report.freed_bytes == sum(report.sizes[key] for key in report.deleted) > 0


def test_sweeping_again_changes_nothing() -> None:
    """A second sweep finds nothing to do."""
    run = new_run(CheckpointPolicy(keep_last=2))
    train(run, *TENS)
    sweeper = Sweeper(run.store, run.run_id, clock=run.clock, grace=NO_GRACE)
    assert sweeper.sweep().deleted
    assert sweeper.sweep().deleted == []


def test_a_bounded_sweep_gets_there_in_the_end() -> None:
    """With few reads and few deletes at a time, repeated sweeps leave what one unbounded sweep leaves."""
    outcomes = []
    for bounds in ({}, {"depth": 2, "max_deletes": 3}):
        run = new_run(CheckpointPolicy(keep_last=2, keep_every_steps=50))
        train(run, *TENS)
        run.succeed()
        sweeper = Sweeper(run.store, run.run_id, clock=run.clock, grace=NO_GRACE, **bounds)
        for _ in range(20):
            report = sweeper.sweep()
            assert len(report.deleted) <= bounds.get("max_deletes", 1000)
        outcomes.append((steps_left(run), states_left(run)))
    assert outcomes[0] == outcomes[1]


def test_a_late_look_spares_what_has_come_to_be_needed() -> None:
    """An average that is added between deciding and deleting keeps what it can be made from."""
    run = new_run(CheckpointPolicy(keep_last=1))
    train(run, *TENS)
    run.succeed()
    sweeper = Sweeper(_AddsAverage(run), run.run_id, clock=run.clock, grace=NO_GRACE)  # type: ignore[arg-type]

    assert sweeper.sweep().deleted == []
    assert steps_left(run) == list(TENS)


class _AddsAverage:
    """A store whose sweeper is slow: an average is added right after its first look at the run."""

    def __init__(self, run: MiniatureRun) -> None:
        self._run = run
        self._num_lists = 0

    def list(self, prefix: str, **options: object) -> object:
        found = list(self._run.store.list(prefix, **options))  # type: ignore[arg-type]
        if "/assessments/" in prefix and not self._num_lists:
            self._num_lists += 1
            self._run.add_average("late", "swa")
        return iter(found)

    def __getattr__(self, name: str) -> Callable[..., object]:
        return getattr(self._run.store, name)  # type: ignore[no-any-return]


def test_on_a_real_store(seaweed: Seaweed) -> None:
    """SeaweedFS: the policy is carried out, two sweepers at once, and the store's time is near ours."""
    run = new_run(CheckpointPolicy(keep_last=2), seaweed.new_store())
    train(run, 10, 20, 30, 40)
    at = fetch_store_time(run.store)
    assert abs(at - type(at).now(at.tzinfo)) < timedelta(seconds=10)
    sweepers = [Sweeper(run.store, run.run_id, clock=run.clock, grace=NO_GRACE) for _ in range(2)]
    found = Survey(run.store, run.run_id, clock=run.clock).take()
    doomed = [
        k for k, v in plan(found.picture, found.objects, now=at, grace=NO_GRACE).items() if isinstance(v, Delete)
    ]

    deleted = [set(sweeper.sweep().deleted) for sweeper in sweepers]

    assert deleted == [set(doomed), set()]
    assert steps_left(run) == [30, 40]
