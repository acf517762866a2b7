"""Decides what an averager does next for one run. Pure: it reads a snapshot and returns one action.

The worker acts; this module only says which action is due. Its order is the protocol: never fold across a
branch, fold before assessing, publish what is folded before anything that may take long, and end a run only when
every average is published through its last checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class AverageView:
    """Where one average stands, in memory and as published.

    `cursor` is the run-log seq through which it has taken every checkpoint; `folded` are the seqs in it.
    `num_unpublished` counts the checkpoints taken since its newest generation; `is_dirty` says that memory differs
    from that generation even so (it could not be read). `is_assessed` speaks of the newest generation, and
    `attempt` is the newest attempt that the writer of that one knew of.
    """

    name: str
    cursor: int
    folded: frozenset[int]
    num_unpublished: int
    is_dirty: bool
    is_assessed: bool
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class RunView:
    """What the policy needs to know of a run.

    `lineage` are the seqs of its surviving checkpoints, ascending; `branched_at` is the newest attempt that
    abandoned some, 0 while none has. Assessing goes on beside everything else:
    `assessing` names the averages that a job of this run is at, `is_assessor_idle` says whether one may start.
    """

    lineage: Sequence[int]
    is_training_over: bool
    is_assessment_due: bool
    averages: Sequence[AverageView]
    is_assessor_idle: bool = True
    assessing: frozenset[str] = frozenset()
    branched_at: int = 0


@dataclass(frozen=True, slots=True)
class Rewind:
    """These averages hold checkpoints of an abandoned branch; go back to a generation inside the lineage."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fold:
    """Read checkpoint `seq` once and give it to all of these averages (each rule may still skip it)."""

    seq: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Publish:
    """Commit the next generation of these averages."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Assess:
    """Begin to recalibrate and evaluate the newest generation of these averages, all in one go."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing more will come: every average is published and assessed through the last checkpoint."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do now."""


Action = Rewind | Fold | Publish | Assess | Finish | Wait


def next_action(run: RunView, *, publish_every_folds: int) -> Action:
    """The one thing to do next.

    While behind, an average is published every `publish_every_folds` checkpoints; when caught up, after each. It
    is also published once after a branch was abandoned, whatever it holds: an averager that has not heard of that
    may be about to create the same generation, with abandoned checkpoints in it, and must find the number taken.
    """
    lineage = frozenset(run.lineage)
    if astray := tuple(average.name for average in run.averages if not average.folded <= lineage):
        return Rewind(astray)
    fold = _next_fold(run)
    pending = tuple(
        average.name
        for average in run.averages
        if (average.is_dirty and not fold)
        or average.attempt < run.branched_at
        or average.num_unpublished >= (publish_every_folds if fold else 1)
    )
    if pending:
        return Publish(pending)
    if fold:
        return fold
    unassessed = tuple(average.name for average in run.averages if average.folded and not average.is_assessed)
    if unassessed or run.assessing:
        is_wanted = run.is_assessment_due or run.is_training_over
        is_possible = run.is_assessor_idle and not run.assessing
        return Assess(unassessed) if unassessed and is_wanted and is_possible else Wait()
    return Finish() if run.is_training_over else Wait()


def _next_fold(run: RunView) -> Fold | None:
    """The oldest checkpoint that some average has not taken, with all the averages that have not."""
    cursor = min((average.cursor for average in run.averages), default=None)
    seq = next((seq for seq in run.lineage if cursor is not None and seq > cursor), None)
    if seq is None:
        return None
    return Fold(seq, tuple(average.name for average in run.averages if average.cursor < seq))
