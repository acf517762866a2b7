"""Where the next attempt grows from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from services.trainer.origin import find_origin
from support.runs import HandmadeRun
from wa_core import layout
from wa_core.records import AttemptFailed, CheckpointCommitted, Paused, ResumeRequested
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Sequence


@pytest.fixture
def run() -> HandmadeRun:
    """A run in its first attempt."""
    return HandmadeRun(MemoryStore(), averages={})


def saved(run: HandmadeRun, *steps: int) -> Sequence[CheckpointCommitted]:
    """Checkpoints at these steps."""
    return [run.checkpoint_bytes(step, b"weights") for step in steps]


def origin_step(run: HandmadeRun) -> int | None:
    """The step that the next attempt grows from."""
    seq = find_origin(run.store, run.log)
    return next((entry.step for entry in run.log.lineage if entry.seq == seq), None)


def test_the_newest_checkpoint_is_grown_from(run: HandmadeRun) -> None:
    """Without a wish it is the newest; without a checkpoint the beginning."""
    assert find_origin(run.store, run.log) is None
    saved(run, 10, 20)
    assert origin_step(run) == 20


@pytest.mark.parametrize(("from_step", "expected"), [(20, 20), (29, 20), (30, 30), (1_000, 30), (0, None)])
def test_f17_a_rewind_grows_from_the_newest_checkpoint_at_or_before_its_step(
    run: HandmadeRun, from_step: int, expected: int | None
) -> None:
    """F17: a wish counts until an attempt has followed it; a pause in between changes nothing."""
    saved(run, 10, 20, 30)
    run.log.append(ResumeRequested(from_step=from_step))
    run.log.append(Paused())
    run.log.append(ResumeRequested())

    assert origin_step(run) == expected

    run.start_attempt(resumed_from=find_origin(run.store, run.log))
    saved(run, 40)
    assert origin_step(run) == 40


def test_f17_two_rewinds_lead_where_the_second_says(run: HandmadeRun) -> None:
    """F17: going back twice, to ever older steps, leaves just the path that was taken."""
    saved(run, 10, 20, 30)
    for step in (20, 10):
        run.log.append(ResumeRequested(from_step=step))
        run.start_attempt(resumed_from=find_origin(run.store, run.log))
        saved(run, step + 5)

    assert [entry.step for entry in run.log.lineage] == [10, 15]


@pytest.mark.parametrize("reason", ["corrupt", "digest_mismatch", "object_missing", "unsafe_pickle"])
def test_a_damaged_checkpoint_is_not_tried_twice(run: HandmadeRun, reason: str) -> None:
    """After an attempt that could not grow from the newest one, the one before it is taken, and so on back."""
    steps = (10, 20, 30)
    saved(run, *steps)
    tried = []
    for _ in range(4):
        tried.append(origin_step(run))
        run.start_attempt(resumed_from=find_origin(run.store, run.log))
        run.log.append(AttemptFailed(reason=reason))

    assert tried == [30, 20, 10, None]


def test_an_attempt_that_got_on_says_nothing_against_its_origin(run: HandmadeRun) -> None:
    """What fails after a checkpoint of its own did grow: its origin stays in the path."""
    first, _ = saved(run, 10, 20)
    run.start_attempt(resumed_from=first.seq)
    saved(run, 15)
    run.log.append(AttemptFailed(reason="corrupt"))

    assert origin_step(run) == 15


def test_a_checkpoint_whose_files_are_gone_is_passed_over(run: HandmadeRun) -> None:
    """What retention, or a hand, has deleted costs no attempt."""
    _, newest = saved(run, 10, 20)
    run.store.delete(newest.files[layout.MODEL_FILE].key)

    assert origin_step(run) == 10
