"""Retention, one reason at a time: what is kept, what goes, and what is said of it."""

from __future__ import annotations

import pytest

from support.histories import FAULTY, MiniatureAverager
from support.retention import TENS, new_run, states_left, steps_left, sweep, train
from wa_core.catalog.retention import Grace
from wa_core.records import CheckpointPolicy


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
