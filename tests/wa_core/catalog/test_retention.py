"""Retention, one reason at a time: what is kept, what goes, and what is said of it."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from support.histories import FAULTY, MiniatureAverager, MiniatureRun, exists
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.catalog.files import put_file
from wa_core.catalog.retention import Delete, Grace, Keep, plan
from wa_core.catalog.survey import Survey
from wa_core.catalog.sweeper import Sweeper, fetch_store_time
from wa_core.records import Assessment, AssessmentRecord, BatchNormSummary, CheckpointPolicy, Evaluation
from wa_core.store.local import LocalStore
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.seaweed import Seaweed
    from wa_core.catalog.retention import Verdict
    from wa_core.store.base import ObjectStore

NO_GRACE = Grace(orphan_s=0, download_s=0, settle_s=0)


def new_run(policy: CheckpointPolicy, store: ObjectStore | None = None, **averages: str) -> MiniatureRun:
    """A run with these averages; SWA when none is given."""
    return MiniatureRun(store or MemoryStore(), averages=averages or {"swa": "swa"}, policy=policy)


def train(run: MiniatureRun, *steps: int, losses: tuple[float, ...] = (), publishes: bool = True) -> None:
    """Checkpoints, each taken and published at once by every average."""
    averagers = [MiniatureAverager(run, name) for name in run.averages]
    for at, step in enumerate(steps):
        run.checkpoint(step, loss=losses[at] if losses else None)
        for averager in averagers if publishes else ():
            averager.catch_up()


def sweep(run: MiniatureRun, grace: Grace = NO_GRACE) -> dict[str, Verdict]:
    """Sweep, and return the verdicts."""
    return dict(Sweeper(run.store, run.run_id, clock=run.clock, grace=grace).sweep().verdicts)


def steps_left(run: MiniatureRun) -> list[int]:
    """The steps of the surviving checkpoints that are there."""
    return [entry.step for entry in run.log.lineage if run.has(entry)]


def states_left(run: MiniatureRun, name: str = "swa") -> list[int]:
    """The generations whose states are there."""
    found = Generations(run.store, run.run_id, name).newest_first()
    return [one.generation for one in found if one.shadow and exists(run.store, one.shadow.key)][::-1]


TENS = tuple(range(10, 110, 10))


@pytest.mark.parametrize(
    ("policy", "left"),
    [
        (CheckpointPolicy(), list(TENS)),
        (CheckpointPolicy(keep_last=1), [100]),
        (CheckpointPolicy(keep_last=3), [80, 90, 100]),
        (CheckpointPolicy(keep_every_steps=25), [30, 50, 80, 100]),
        (CheckpointPolicy(keep_every_steps=10), list(TENS)),
        (CheckpointPolicy(keep_best=2), [20, 30, 100]),
        (CheckpointPolicy(keep_last=2, keep_every_steps=40, keep_best=1), [30, 40, 80, 90, 100]),
    ],
)
def test_the_policy_says_which_checkpoints_are_kept(policy: CheckpointPolicy, left: list[int]) -> None:
    """The last, the first at or after each multiple, the best; any of them keeps, and the newest always stays."""
    run = new_run(policy)
    train(run, *TENS, losses=(5, 2, 1, 4, 4, 4, 4, 4, 4, 4))
    run.succeed()

    sweep(run)

    assert steps_left(run) == left


def test_an_average_that_lags_holds_what_it_lacks() -> None:
    """With one average two checkpoints behind, both are there, and the reason names it."""
    run = new_run(CheckpointPolicy(keep_last=1), swa="swa", ema="ema:half_life=10")
    train(run, 10, 20)
    for step in (30, 40, 50):
        run.checkpoint(step)
    MiniatureAverager(run, "swa").catch_up()
    run.succeed()

    verdicts = sweep(run)

    assert steps_left(run) == [30, 40, 50]
    assert "average 'ema' has not passed it" in {verdict.reason for verdict in verdicts.values()}


def test_a_window_holds_its_checkpoints() -> None:
    """keep_last=1 leaves all of the window, and nothing before it."""
    run = new_run(CheckpointPolicy(keep_last=1), window="window:last=4")
    train(run, *TENS)
    run.succeed()

    assert "inside the window of 'window'" in {verdict.reason for verdict in sweep(run).values()}

    assert steps_left(run) == [70, 80, 90, 100]


def test_a_window_can_go_back_to_each_kept_checkpoint() -> None:
    """What was in the window at a kept checkpoint is held as well, so that a rewind finds it."""
    run = new_run(CheckpointPolicy(keep_every_steps=50), window="window:last=3")
    train(run, *TENS)

    sweep(run)
    assert steps_left(run) == [30, 40, 50, 70, 80, 90, 100]

    run.succeed()
    sweep(run)
    assert steps_left(run) == [50, 80, 90, 100]


def test_an_added_average_holds_every_checkpoint_and_state_until_it_has_begun() -> None:
    """A rebuild needs whatever is left: nothing goes between the asking and the first generation."""
    run = new_run(CheckpointPolicy(keep_last=2))
    train(run, *TENS)
    run.succeed()
    run.add_average("late", "ema:half_life=10")
    before = states_left(run)

    verdicts = sweep(run)

    assert steps_left(run) == list(TENS)
    assert states_left(run) == before
    assert "average 'late' has not begun, and may be rebuilt from it" in {v.reason for v in verdicts.values()}
    MiniatureAverager(run, "late").catch_up()
    sweep(run)
    assert steps_left(run) == [90, 100]


def test_while_the_run_goes_on_a_lost_state_can_be_made_again() -> None:
    """The newest two states stay, and the checkpoints between them; after the end the policy alone counts."""
    run = new_run(CheckpointPolicy(keep_last=1))
    train(run, 10, 20)
    averager = MiniatureAverager(run, "swa")
    for step in (30, 40, 50):
        run.checkpoint(step)
    averager.catch_up()

    sweep(run)

    assert steps_left(run) == [30, 40, 50]
    assert states_left(run) == [2, 3]
    averager.crash()
    averager.step(can_read_newest=False)
    assert averager.catch_up().folded == [entry.seq for entry in run.log.lineage]
    run.succeed()
    sweep(run)
    assert steps_left(run) == [50]


def test_states_are_kept_to_go_back_to_kept_checkpoints() -> None:
    """Each kept checkpoint that cannot be replayed from the beginning has a state at or before it."""
    run = new_run(CheckpointPolicy(keep_every_steps=40))
    train(run, *TENS)

    sweep(run)

    assert steps_left(run) == [40, 80, 100]
    assert states_left(run) == [4, 8, 9, 10]
    run.attempt(resumed_from=run.log.lineage[3].seq)
    assert MiniatureAverager(run, "swa").catch_up().folded == [entry.seq for entry in run.log.lineage]
    assert [entry.step for entry in run.log.lineage] == [10, 20, 30, 40]


def test_between_sparse_states_the_checkpoints_are_kept() -> None:
    """Where no state was published at a kept checkpoint, those since the last state before it are held."""
    run = new_run(CheckpointPolicy(keep_every_steps=50))
    averager = MiniatureAverager(run, "swa")
    for step in TENS:
        run.checkpoint(step)
        if step in {30, 70, 100}:
            averager.catch_up()

    sweep(run)

    assert steps_left(run) == [40, 50, 80, 90, 100]  # the last two: should the newest state be lost
    assert states_left(run) == [1, 2, 3]


def test_with_every_checkpoint_kept_two_states_are_enough() -> None:
    """Without a policy any rewind can be replayed from the checkpoints."""
    run = new_run(CheckpointPolicy())
    train(run, *TENS)

    sweep(run)

    assert states_left(run) == [9, 10]


def test_power_averages_keep_snapshots() -> None:
    """One state for each multiple of keep_every_steps, to rebuild other averages from."""
    run = new_run(CheckpointPolicy(keep_every_steps=30, keep_last=1), power="power:sigma_rel=0.1,start_step=20")
    train(run, *TENS)
    run.succeed()

    verdicts = sweep(run)

    assert states_left(run, "power") == [3, 6, 9, 10]
    assert any("snapshot" in v.reason or "go back" in v.reason for v in verdicts.values())


def test_abandoned_checkpoints_go_once_every_average_has_left_them() -> None:
    """Not before: an average may still be at what it has folded of them."""
    run = new_run(CheckpointPolicy(keep_last=3))
    train(run, 10, 20, 30)
    abandoned = run.log.lineage[2]
    run.attempt(resumed_from=run.log.lineage[1].seq)

    assert "abandoned, but average 'swa' has not gone back yet" in {v.reason for v in sweep(run).values()}

    assert run.has(abandoned)
    train(run, 31)
    sweep(run)
    assert not run.has(abandoned)
    assert steps_left(run) == [10, 20, 31]


def test_without_a_policy_abandoned_checkpoints_stay() -> None:
    """None set means that all checkpoints are kept."""
    run = new_run(CheckpointPolicy())
    train(run, 10, 20)
    abandoned = run.log.lineage[1]
    run.attempt(resumed_from=run.log.lineage[0].seq)
    train(run, 21)

    sweep(run)

    assert run.has(abandoned)


def test_a_rejected_checkpoint_holds_nothing() -> None:
    """One that no average folded is not needed to go back anywhere."""
    run = new_run(CheckpointPolicy(keep_last=1))
    averager = MiniatureAverager(run, "swa")
    for step, body in ((10, b"sound"), (20, FAULTY), (30, b"sound")):
        run.checkpoint(step, body=body)
        averager.catch_up()
    run.succeed()

    sweep(run)

    assert steps_left(run) == [30]


def test_what_was_just_the_newest_is_left_alone_while_the_run_goes_on() -> None:
    """A runner may have chosen it: the checkpoint before the newest stays for a while."""
    run = new_run(CheckpointPolicy(keep_last=1))
    train(run, 10, 20)

    verdicts = sweep(run, Grace(settle_s=60))

    assert steps_left(run) == [10, 20]
    assert "the newest, a moment ago" in {verdict.reason for verdict in verdicts.values()}


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
