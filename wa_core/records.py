"""Every record the processes exchange through the bucket. Units are in the field names; times are aware UTC.

Records are immutable. Those that are committed create-once carry a random `write_id`, by which a writer
recognises its own write when the response was lost (ADR 0003).
"""

from __future__ import annotations

import secrets
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    TypeAdapter,
    model_validator,
)

FORMAT: Literal[1] = 1

#: The metric that every recipe has and that `best` and `won` go by; less is better.
HEADLINE_METRIC = "loss"

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


# -- what a user asks for -----------------------------------------------------------------------------------


class Scaling(Request):
    """How many workers train, and on what."""

    num_workers: int = Field(default=2, ge=1, le=1024)
    use_gpu: bool = False


class CheckpointPolicy(Request):
    """When checkpoints are taken, and which of them are kept (ADR 0011).

    A checkpoint is kept if any of the three says so; with none of them set, all are. Whatever they say, the newest
    is kept, and so is every one that an average, a window or a rewind still needs.
    """

    every_steps: int = Field(default=20, ge=1, le=10_000_000)
    keep_last: int | None = Field(
        default=None, ge=1, le=1_000_000, description="keep the newest so many checkpoints"
    )
    keep_every_steps: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="keep the first checkpoint at or after each multiple of this",
    )
    keep_best: int | None = Field(
        default=None, ge=1, le=1_000_000, description="keep the so many checkpoints with the lowest held-out loss"
    )

    @property
    def keeps_all(self) -> bool:
        """Whether nothing says which checkpoints are kept, so that all are."""
        return self.keep_last is None and self.keep_every_steps is None and self.keep_best is None


class AverageRequest(Request):
    """One average that the run should have.

    `accumulator_dtype` is what the folds are summed in; float32 halves the memory and loses a few units in
    the last place over many folds (ADR 0005).
    """

    name: Name
    rule: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    accumulator_dtype: Literal["float32", "float64"] = "float64"


class RunRequest(Request):
    """The body of a submission."""

    recipe: Annotated[
        str, StringConstraints(max_length=300, pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$")
    ]
    package: Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    config: dict[str, JsonValue] = Field(default_factory=dict)
    scaling: Scaling = Field(default_factory=Scaling)
    checkpoint: CheckpointPolicy = Field(default_factory=CheckpointPolicy)
    averages: list[AverageRequest] = Field(default_factory=list, max_length=MAX_AVERAGES)
    labels: dict[Name, Annotated[str, StringConstraints(max_length=256)]] = Field(
        default_factory=dict, max_length=64
    )
    priority: int = Field(default=50, ge=0, le=99)
    max_failures: int = Field(default=2, ge=0, le=100)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _names_are_unique(self) -> RunRequest:
        names = [average.name for average in self.averages]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two averages are named {twice[0]!r}; give each its own name")
        return self


class RecipeConfig(Request):
    """What every recipe can be told; a recipe's own config adds to it (`wa_core.recipe.Recipe`).

    `batch_size` is the global one, shared out over the workers: a run with another number of workers sees the
    same batches.
    """

    epochs: int = Field(default=1, ge=1, le=1_000_000)
    batch_size: int = Field(default=64, ge=1, le=1_000_000)


class RunSpec(Record):
    """A submitted run: what was asked for, and when. Written once, as `run.json`."""

    format: Literal[1] = FORMAT
    run_id: str
    write_id: str = Field(default_factory=new_write_id)
    created_at: AwareDatetime
    request: RunRequest


# -- the run log --------------------------------------------------------------------------------------------


class FileRef(Record):
    """A stored file and what its bytes must be."""

    key: str
    size_bytes: int = Field(ge=0)
    sha256: Sha256


class LogEntry(Record):
    """What every entry of a run log says. `RunLog.append` stamps seq, previous, at, attempt and state.

    `previous` is the digest of the entry before, as stored; None in the first. It proves a hint (ADR 0012).
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
    """A runner has taken the run. `resumed_from` is the seq of the checkpoint it grows from, or None."""

    kind: Literal["attempt_started"] = "attempt_started"
    runner_id: str
    resumed_from: int | None = None


class CheckpointCommitted(LogEntry):
    """A checkpoint is whole in the bucket. `files` is keyed by file name."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int = Field(ge=0)
    epoch: int = Field(default=0, ge=0)
    lr: float | None = None
    files: dict[str, FileRef]
    spec_digest: Sha256
    metrics: dict[str, float] = Field(default_factory=dict)
    stall_s: float = Field(default=0.0, ge=0)


class PauseRequested(LogEntry):
    """Somebody wants the run to pause."""

    kind: Literal["pause_requested"] = "pause_requested"


class Paused(LogEntry):
    """The run holds no resources and can be resumed."""

    kind: Literal["paused"] = "paused"


class ResumeRequested(LogEntry):
    """Somebody wants the run to go on, from `from_step` or from its last checkpoint."""

    kind: Literal["resume_requested"] = "resume_requested"
    from_step: int | None = None


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


# -- averages -----------------------------------------------------------------------------------------------


class SetAside(Record):
    """A checkpoint that an average did not fold: `rejected` for a fault, `skipped` by its rule."""

    seq: int
    step: int
    code: str
    message: str = ""


class Evaluation(Record):
    """Held-out metrics of one set of weights, by metric name (such as ``loss`` and ``accuracy``)."""

    step: int
    metrics: dict[str, float]


class BatchNormSummary(Record):
    """What recalibration did: ``recalibrated``, ``skipped`` (no BatchNorm layers) or ``failed``."""

    status: Literal["recalibrated", "skipped", "failed"]
    num_layers: int = Field(default=0, ge=0)
    num_batches: int = Field(default=0, ge=0)
    num_samples: int = Field(default=0, ge=0)
    code: str | None = None
    message: str = ""


class Comparison(Record):
    """Averaged minus raw weights in one metric, on the same held-out data; less is better.

    `low` and `high` bound the difference with the given `confidence`. Whoever has the better side of an interval
    without 0 has won; otherwise it is a ``tie``. `num_samples` counts the pairs: samples, or whole batches where
    the recipe does not tell samples apart (`unit`).
    """

    metric: str
    difference: float
    low: float
    high: float
    confidence: float = Field(default=0.95, gt=0, lt=1)
    num_samples: int = Field(ge=1)
    unit: Literal["sample", "batch"] = "sample"
    won: Literal["averaged", "raw", "tie"]

    @model_validator(mode="after")
    def _verdict_follows(self) -> Comparison:
        verdict = "averaged" if self.high < 0 else "raw" if self.low > 0 else "tie"
        if self.low > self.high or self.won != verdict:
            raise ValueError(
                f"{self.won!r} does not follow from a difference in [{self.low}, {self.high}]; that is {verdict!r}"
            )
        return self


class Assessment(Record):
    """What the assess process found out about one generation.

    When `batchnorm.status` is ``failed``, the published weights carry pooled BatchNorm statistics. Metrics that
    are not finite are left out. `comparison` is None where there was nothing to compare with, or too little.
    `data_sha256` is a digest of the held-out and calibration batches: only assessments on the same data compare.
    """

    raw: Evaluation | None = None
    averaged: Evaluation | None = None
    before_recalibration: Evaluation | None = None
    batchnorm: BatchNormSummary
    comparison: Comparison | None = None
    data_sha256: Sha256 | None = None
    took_s: float = Field(default=0.0, ge=0)


class RebuiltPart(Record):
    """A file that a rebuilt average was summed from: a checkpoint's weights, or the state of another average."""

    file: FileRef
    weight: float


class Rebuilt(Record):
    """How an average began that was made from what was kept, not from every checkpoint (ADR 0014).

    `parts` are in the order of summing, and `through` is the log seq up to which they stand for the run; later
    checkpoints were folded on top. `profile_error` is how far the coefficients then were from the rule's, as a
    part of them; `noise_gain` bounds how much larger the parts' rounding errors came out.
    """

    parts: list[RebuiltPart] = Field(min_length=1)
    through: int = Field(ge=1)
    profile_error: float = Field(ge=0)
    noise_gain: float = Field(ge=0)


class AverageManifest(Record):
    """One generation of one average: cursor and shadow in one record, so they cannot disagree.

    `cursor` is the run-log seq through which everything has been folded, skipped or rejected. `folded` holds
    the log seqs behind `coefficients` (step -> weight, summing to 1), in folding order. `attempt` is the newest
    attempt that its writer knew of, 0 where that was not recorded. What is served of a generation, and how it
    measures, is in its `AssessmentRecord`, once there is one. Of a `rebuilt` average the `coefficients` are near
    the rule's, not equal to them.
    """

    format: Literal[1] = FORMAT
    run_id: str
    name: Name
    generation: int = Field(ge=1)
    write_id: str = Field(default_factory=new_write_id)
    at: AwareDatetime
    rule: str
    accumulator_dtype: Literal["float32", "float64"]
    cursor: int = Field(ge=0)
    attempt: int = Field(default=0, ge=0)
    folded: list[int] = Field(default_factory=list)
    coefficients: dict[int, float] = Field(default_factory=dict)
    rejected: list[SetAside] = Field(default_factory=list)
    skipped: list[SetAside] = Field(default_factory=list)
    shadow: FileRef | None = None
    rebuilt: Rebuilt | None = None

    @property
    def n_averaged(self) -> int:
        """How many checkpoints are in the average."""
        return len(self.folded)

    @property
    def first_step(self) -> int | None:
        """The first step with a part in the average."""
        return min(self.coefficients, default=None)

    @property
    def last_step(self) -> int | None:
        """The last step with a part in the average."""
        return max(self.coefficients, default=None)


class AssessmentRecord(Record):
    """What is served of one generation, by file name, and how it measures: a record of its own (ADR 0008).

    `best` is the generation with the lowest held-out loss so far, this one included; None before any was measured.
    """

    format: Literal[1] = FORMAT
    run_id: str
    name: Name
    generation: int = Field(ge=1)
    write_id: str = Field(default_factory=new_write_id)
    at: AwareDatetime
    files: dict[str, FileRef]
    assessment: Assessment
    best: int | None = Field(default=None, ge=1)


# -- advisory -----------------------------------------------------------------------------------------------


class Heartbeat(Record):
    """A sign of life; advisory, overwritten, never the truth."""

    who: str
    at: AwareDatetime
    attempt: int = 0
    step: int | None = None
    total_steps: int | None = None
    epoch: int | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    detail: str = ""


class Marker(Record):
    """Says that a run waits (`queue/`) or is under way (`active/`), so that nobody must read every run."""

    run_id: str
    at: AwareDatetime
