"""What an entry of a run's log says, in one line for people. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.api.dashboard.numbers import count, number, size
from wa_core.records import (
    AttemptFailed,
    AttemptStarted,
    AverageAdded,
    CheckpointCommitted,
    Failed,
    ResumeRequested,
    TrainingFinished,
)

if TYPE_CHECKING:
    from wa_core.records import Entry


def describe(entry: Entry) -> str:  # noqa: PLR0911  one for each kind
    """The details of an entry; its kind says the rest."""
    match entry:
        case CheckpointCommitted():
            size_bytes = sum(file.size_bytes for file in entry.files.values())
            rate = f", learning rate {number(entry.lr)}" if entry.lr is not None else ""
            return f"step {count(entry.step)}, {size(size_bytes)}{rate}"
        case AttemptStarted():
            begun = f"from the checkpoint of entry {entry.resumed_from}" if entry.resumed_from else "from nothing"
            return f"attempt {entry.attempt} on {entry.runner_id}, {begun}"
        case AttemptFailed() | Failed():
            return f"{entry.reason}: {entry.message}" if entry.message else entry.reason
        case ResumeRequested():
            return _changes(entry)
        case TrainingFinished():
            return f"at step {count(entry.step)}"
        case AverageAdded():
            return f"{entry.average.name}: {entry.average.rule}"
        case _:
            return ""


def _changes(entry: ResumeRequested) -> str:
    back = f"from step {count(entry.from_step)}" if entry.from_step is not None else ""
    scaled = f"learning rate times {number(entry.lr_scale)}" if entry.lr_scale != 1 else ""
    skipped = f"{count(entry.skip_batches)} batches left out" if entry.skip_batches else ""
    return ", ".join(part for part in (back, scaled, skipped) if part)
