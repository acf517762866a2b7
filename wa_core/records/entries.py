"""The entries of a run log, which is the truth about a run. `RunLog.append` alone writes them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, TypeAdapter

from wa_core.records.base import FORMAT, Record, RunState, Sha256, new_write_id
from wa_core.records.submission import AverageRequest


class FileRef(Record):
    """A stored file and what its bytes must be."""

    key: str
    size_bytes: int = Field(ge=0)
    sha256: Sha256


class LogEntry(Record):
    """What every entry of a run log says. `RunLog.append` stamps seq, previous, at, attempt and state.

    `previous` is the digest of the entry before, as stored; None in the first. It proves a hint (ADR 12).
    """

    format: Literal[1] = FORMAT
    seq: int = 0
    previous: Sha256 | None = None
    write_id: str = Field(default_factory=new_write_id)
    at: AwareDatetime | None = None
    attempt: int = 0
    state: RunState = RunState.QUEUED


class Submitted(LogEntry):
    """The run exists and waits for a runner."""

    kind: Literal["submitted"] = "submitted"


class AttemptStarted(LogEntry):
    """A runner has taken the run. `resumed_from` is the seq of the checkpoint it grows from, or None.

    `num_workers` is how many train in this attempt; None: as many as the run asks for.
    """

    kind: Literal["attempt_started"] = "attempt_started"
    runner_id: str
    resumed_from: int | None = None
    num_workers: int | None = Field(default=None, ge=1)


class CheckpointCommitted(LogEntry):
    """A checkpoint is whole in the bucket. `files` is keyed by file name.

    `is_last` says that training has come to its end with it.
    """

    kind: Literal["checkpoint"] = "checkpoint"
    step: int = Field(ge=0)
    epoch: int = Field(default=0, ge=0)
    lr: float | None = None
    files: dict[str, FileRef]
    spec_digest: Sha256
    metrics: dict[str, float] = Field(default_factory=dict)
    stall_s: float = Field(default=0.0, ge=0)
    is_last: bool = False


class PauseRequested(LogEntry):
    """Somebody wants the run to pause."""

    kind: Literal["pause_requested"] = "pause_requested"


class Paused(LogEntry):
    """The run holds no resources and can be resumed."""

    kind: Literal["paused"] = "paused"


class ResumeRequested(LogEntry):
    """Somebody wants the run to go on, from `from_step` or from its last checkpoint.

    From there on learning rates are multiplied by `lr_scale`, and the next `skip_batches` batches are left out.
    """

    kind: Literal["resume_requested"] = "resume_requested"
    from_step: int | None = None
    lr_scale: float = 1.0
    skip_batches: int = 0


class CancelRequested(LogEntry):
    """Somebody wants the run to end."""

    kind: Literal["cancel_requested"] = "cancel_requested"


class AttemptFailed(LogEntry):
    """An attempt ended badly. `reason` is a stable code; `message` is for people."""

    kind: Literal["attempt_failed"] = "attempt_failed"
    reason: str
    message: str = ""


class TrainingFinished(LogEntry):
    """All steps are done and every offered checkpoint is committed."""

    kind: Literal["training_finished"] = "training_finished"
    step: int
    metrics: dict[str, float] = Field(default_factory=dict)


class Succeeded(LogEntry):
    """Every average is published through the last checkpoint."""

    kind: Literal["succeeded"] = "succeeded"


class Failed(LogEntry):
    """The run ended without finishing."""

    kind: Literal["failed"] = "failed"
    reason: str
    message: str = ""


class Cancelled(LogEntry):
    """The run ended because somebody asked."""

    kind: Literal["cancelled"] = "cancelled"


class AverageAdded(LogEntry):
    """The run should have one more average; said in any state, also after the end, and changes none."""

    kind: Literal["average_added"] = "average_added"
    average: AverageRequest


Entry = Annotated[
    Submitted
    | AttemptStarted
    | CheckpointCommitted
    | PauseRequested
    | Paused
    | ResumeRequested
    | CancelRequested
    | AttemptFailed
    | TrainingFinished
    | Succeeded
    | Failed
    | Cancelled
    | AverageAdded,
    Field(discriminator="kind"),
]
entry_adapter: TypeAdapter[Entry] = TypeAdapter(Entry)
