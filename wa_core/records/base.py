"""What all records have in common: their base classes, the names and digests in them, the states of a run."""

from __future__ import annotations

import secrets
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

FORMAT: Literal[1] = 1

#: The metric that every recipe has and that `best` and `won` go by; less is better.
HEADLINE_METRIC = "loss"

#: Whose a run is that was submitted without a token of a name.
DEFAULT_OWNER = "default"

#: Of one run, submitted and added.
MAX_AVERAGES = 32

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def new_write_id() -> str:
    """A random identity for one write."""
    return secrets.token_hex(16)


class RunState(StrEnum):
    """What a run is doing, derived from its log."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    RECOVERING = "recovering"
    PAUSING = "pausing"
    PAUSED = "paused"
    FINALIZING = "finalizing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the run can no longer change."""
        return self in {RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED}

    @property
    def is_training(self) -> bool:
        """Whether an attempt holds, or should hold, the run."""
        return self in {RunState.STARTING, RunState.RUNNING, RunState.RECOVERING, RunState.PAUSING}


#: The states in which an attempt holds, or should hold, a run.
TRAINING = frozenset(state for state in RunState if state.is_training)


class AveragingState(StrEnum):
    """What the averaging of a run is doing."""

    WAITING = "waiting"
    FOLDING = "folding"
    ASSESSING = "assessing"
    PUBLISHED = "published"
    STALLED = "stalled"


class Record(BaseModel):
    """Base of all records: immutable; a field that this version does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Request(Record):
    """Base of what users write: no silent conversion, so ``"3"`` is not 3."""

    model_config = ConfigDict(strict=True)
