"""A run and its averages as the bucket had them at one moment.

They know records; not where those were read, nor what is shown of them, though they keep it. What they say never
changes: who wants to know more looks again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wa_core.catalog.history import lineage
from wa_core.catalog.runs import requested_averages
from wa_core.records import RunState

if TYPE_CHECKING:
    from collections.abc import Hashable

    from wa_core.records import (
        AssessmentRecord,
        AverageManifest,
        AverageRequest,
        CheckpointCommitted,
        Entry,
        Heartbeat,
        RunSpec,
    )


@dataclass(frozen=True, slots=True)
class AverageSnapshot:
    """One average: its newest generation, and the newest that has been assessed and can be downloaded."""

    name: str
    newest: AverageManifest | None
    served: AssessmentRecord | None


@dataclass(frozen=True, slots=True)
class Stall:
    """Why the averaging of a run does not get on."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """A run at one moment, and `rendered`: answers made of nothing else (body and ETag), kept as long as it is."""

    spec: RunSpec
    entries: tuple[Entry, ...]
    desired_state: str
    heartbeat: Heartbeat | None
    averages: tuple[AverageSnapshot, ...]
    waiting: Heartbeat | None = None
    stall: Stall | None = None
    rendered: dict[Hashable, tuple[bytes, str]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def state(self) -> RunState:
        """The state that the log's last entry gives."""
        return self.entries[-1].state if self.entries else RunState.QUEUED

    @property
    def attempt(self) -> int:
        """The newest attempt, 0 before the first."""
        return self.entries[-1].attempt if self.entries else 0

    @property
    def wanted(self) -> list[AverageRequest]:
        """The averages asked for, in the order of `averages`."""
        return requested_averages(self.spec, self.entries)

    @property
    def lineage(self) -> list[CheckpointCommitted]:
        """The surviving checkpoints."""
        return lineage(self.entries)
