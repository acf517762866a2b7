"""What follows an attempt that ended badly, and how much of its time a run has used. Pure: it knows only the log.

A failure counts against `max_failures` unless it is not the run's fault: its runner was stopped, nodes were
lost before its workers were there, or the checkpoint that it was to grow from is damaged (the next attempt
takes the one before). A lost runner is forgiven as well, but not for ever: a run that ends its runner before it
has kept anything, again and again, is what ends it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.trainer.failure import (
    HOPELESS,
    NODES_LOST,
    RUN_DEADLINE,
    RUNNER_LOST,
    RUNNER_STOPPED,
    SPOILED,
    Failure,
)
from wa_core.records import AttemptFailed, AttemptStarted, CheckpointCommitted, ResumeRequested, Submitted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from wa_core.records import Entry, LogEntry, RunRequest

MAX_LOST = 3


@dataclass(frozen=True, slots=True)
class AttemptTold:
    """An attempt as the log tells it: `resumed_from` is a log seq, `failure` None while there is none."""

    resumed_from: int | None
    num_checkpoints: int = 0
    failure: Failure | None = None

    @property
    def is_spoiled(self) -> bool:
        """Whether it ended because the checkpoint that it was to grow from is damaged."""
        is_damage = self.failure is not None and self.failure.reason in SPOILED
        return is_damage and self.resumed_from is not None and not self.num_checkpoints

    @property
    def is_counted(self) -> bool:
        """Whether it counts against `max_failures`."""
        forgiven = {NODES_LOST, RUNNER_LOST, RUNNER_STOPPED}
        return self.failure is not None and self.failure.reason not in forgiven and not self.is_spoiled


def attempts_told(entries: Sequence[LogEntry]) -> list[AttemptTold]:
    """All attempts of a run, in order."""
    told: list[AttemptTold] = []
    for entry in entries:
        match entry:
            case AttemptStarted():
                told.append(AttemptTold(entry.resumed_from))
            case CheckpointCommitted() if told:
                told[-1] = AttemptTold(told[-1].resumed_from, told[-1].num_checkpoints + 1, told[-1].failure)
            case AttemptFailed() if told:
                failure = Failure(reason=entry.reason, message=entry.message)
                told[-1] = AttemptTold(told[-1].resumed_from, told[-1].num_checkpoints, failure)
    return told


def final_failure(entries: Sequence[Entry], request: RunRequest, *, now: datetime) -> Failure | None:
    """Why the run ends with what its log says last, or None if another attempt should follow."""
    told = attempts_told(entries)
    last = told[-1].failure if told else None
    if last is not None and last.reason in HOPELESS:
        return last
    if is_over_time(entries, request, now=now):
        return _over_time(request)
    if last is not None and sum(attempt.is_counted for attempt in told) > request.max_failures:
        return last
    num_lost = sum(1 for _ in _lost_in_a_row(told))
    if num_lost >= MAX_LOST:
        message = f"{num_lost} runners in a row were lost while they trained it, before a checkpoint was kept"
        return Failure(reason=RUNNER_LOST, message=f"{message}; the run may be what ends them")
    return None


def _lost_in_a_row(told: Sequence[AttemptTold]) -> Iterator[AttemptTold]:
    for attempt in reversed(told):
        if attempt.failure is None or attempt.num_checkpoints:
            return
        if attempt.failure.reason == RUNNER_LOST:
            yield attempt
        elif attempt.failure.reason != RUNNER_STOPPED:
            return


def is_over_time(entries: Sequence[Entry], request: RunRequest, *, now: datetime) -> bool:
    """Whether the run's attempts have taken longer together than its owner allows."""
    allowed_s = request.deadlines.run_s
    return allowed_s is not None and spent_s(entries, now=now) > allowed_s


def spent_s(entries: Sequence[Entry], *, now: datetime) -> float:
    """Seconds for which attempts held the run, or should have; waiting and being paused cost nothing."""
    times = [entry.at or now for entry in entries] + [now]
    held = (entry.state.is_training for entry in entries)
    spans = (later - earlier for earlier, later in itertools.pairwise(times))
    return sum(max(0.0, span.total_seconds()) for span, is_held in zip(spans, held, strict=True) if is_held)


def waited_s(entries: Sequence[LogEntry], *, now: datetime) -> float:
    """Seconds since a run was submitted, or its owner last wanted it to go on."""
    since = next((e.at for e in reversed(entries) if isinstance(e, Submitted | ResumeRequested)), None)
    return max(0.0, (now - since).total_seconds()) if since is not None else 0.0


def _over_time(request: RunRequest) -> Failure:
    return Failure(
        reason=RUN_DEADLINE,
        message=f"its attempts have taken longer together than the {request.deadlines.run_s:g} s of its run_s",
    )
