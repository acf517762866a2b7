"""What a run's log says, as pure functions of its entries: the state, and which checkpoints still count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wa_core.records import (
    AttemptFailed,
    AttemptStarted,
    Cancelled,
    CheckpointCommitted,
    Failed,
    LogEntry,
    Paused,
    PauseRequested,
    ResumeRequested,
    RunState,
    Submitted,
    Succeeded,
    TrainingFinished,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


_STATE_AFTER: dict[type[LogEntry], RunState] = {
    Submitted: RunState.QUEUED,
    AttemptStarted: RunState.STARTING,
    PauseRequested: RunState.PAUSING,
    Paused: RunState.PAUSED,
    ResumeRequested: RunState.QUEUED,
    AttemptFailed: RunState.RECOVERING,
    TrainingFinished: RunState.FINALIZING,
    Succeeded: RunState.SUCCEEDED,
    Failed: RunState.FAILED,
    Cancelled: RunState.CANCELLED,
}


def state_after(state: RunState, entry: LogEntry) -> RunState:
    """The state that a run in `state` has once `entry` is in its log.

    A checkpoint proves that a starting attempt runs. It changes nothing else: the last one of an attempt may
    land after its failure was recorded, and must not hide that the run waits for a new attempt.
    """
    if isinstance(entry, CheckpointCommitted):
        return RunState.RUNNING if state is RunState.STARTING else state
    return _STATE_AFTER.get(type(entry), state)


def lineage(entries: Sequence[LogEntry]) -> list[CheckpointCommitted]:
    """The checkpoints that the newest attempt grew from, and its own, in order.

    Those that an older attempt committed after the point where a newer one resumed are abandoned: an average
    never mixes two branches.
    """
    surviving: list[CheckpointCommitted] = []
    for entry in entries:
        extend(surviving, entry)
    return surviving


def branched_at(entries: Sequence[LogEntry]) -> int:
    """The newest attempt that abandoned checkpoints, 0 while none has; see `lineage`."""
    branch, newest = 0, 0
    for entry in entries:
        if isinstance(entry, AttemptStarted):
            branch = entry.attempt if newest > (entry.resumed_from or 0) else branch
            newest = entry.resumed_from or 0
        elif isinstance(entry, CheckpointCommitted):
            newest = entry.seq
    return branch


def extend(surviving: list[CheckpointCommitted], entry: LogEntry) -> None:
    """Take one more entry into a lineage, in place."""
    if isinstance(entry, AttemptStarted):
        surviving[:] = [kept for kept in surviving if kept.seq <= (entry.resumed_from or 0)]
    elif isinstance(entry, CheckpointCommitted):
        surviving.append(entry)
