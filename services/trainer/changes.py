"""What owners changed on the way: learning rates scaled, batches left out, each from a step on.

Read from the run's log alone, so every attempt of a run applies the same changes at the same steps, whatever it
grew from. A change counts from the step at which the run went on with it; going back to an older step takes back
what was changed at that step or later.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wa_core.records import AttemptStarted, CheckpointCommitted, ResumeRequested

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wa_core.records import LogEntry


@dataclass(frozen=True, slots=True)
class Change:
    """After `step` steps: multiply learning rates by `lr_scale`, leave out the next `skip_batches` batches."""

    step: int
    lr_scale: float = 1.0
    skip_batches: int = 0


@dataclass(frozen=True, slots=True)
class Changes:
    """All changes that count, in order."""

    items: tuple[Change, ...] = ()

    def lr_scale(self, step: int) -> float:
        """What the learning rates of the step after `step` steps are multiplied by."""
        return math.prod(change.lr_scale for change in self.items if change.step <= step)

    def batch(self, step: int) -> int:
        """Which batch of the data order (from 0) the step after `step` steps trains on."""
        return step + sum(change.skip_batches for change in self.items if change.step <= step)


def changes_of(entries: Sequence[LogEntry]) -> Changes:
    """The changes that count for the newest attempt in a log.

    Args:
        entries: the run's log, in order, with the attempt's own start in it.
    """
    steps: dict[int | None, int] = {None: 0}
    asked: list[ResumeRequested] = []
    changes: list[Change] = []
    for entry in entries:
        match entry:
            case CheckpointCommitted():
                steps[entry.seq] = entry.step
            case ResumeRequested():
                asked.append(entry)
            case AttemptStarted():
                changes = _changed(changes, asked, step=steps.get(entry.resumed_from, 0))
                asked = []
    return Changes(tuple(changes))


def _changed(changes: list[Change], asked: list[ResumeRequested], *, step: int) -> list[Change]:
    """What counts once an attempt goes on from `step`, as was asked."""
    for wish in asked:
        if wish.from_step is not None:
            changes = [change for change in changes if change.step < step]
        if (wish.lr_scale, wish.skip_batches) != (1.0, 0):
            changes = [*changes, Change(step, lr_scale=wish.lr_scale, skip_batches=wish.skip_batches)]
    return changes
