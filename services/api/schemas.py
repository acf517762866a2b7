"""What the API answers, as pydantic models: the public shape of runs, averages, checkpoints and pages.

These are the API's own; the records in the bucket may change behind them. They are built in
`services.api.resources` and know no store.
"""

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue

from wa_core.records import (
    AverageRequest,
    AveragingState,
    BatchNormSummary,
    CheckpointPolicy,
    Comparison,
    Deadlines,
    RunState,
    Scaling,
    SetAside,
    TrainingOptions,
)

T = TypeVar("T")


class Resource(BaseModel):
    """Base of all answers: immutable."""

    model_config = ConfigDict(frozen=True)


class Reason(Resource):
    """Why a run failed, is recovering or is made to wait."""

    code: str
    message: str


class RunResource(Resource):
    """A run. `metrics` are those of the newest step that reported any."""

    run_id: str
    state: RunState
    desired_state: str = Field(description="what its owner last asked for: succeeded, paused or cancelled")
    averaging_state: AveragingState
    reason: Reason | None
    trainer: Literal["service", "own"] = Field(description="own: a training loop of the user's")
    recipe: str | None = Field(description="null for a run that has none, which only `own` ones may")
    package: str | None
    config: dict[str, JsonValue]
    scaling: Scaling
    checkpoint: CheckpointPolicy
    training: TrainingOptions
    averages: list[AverageRequest]
    labels: dict[str, str]
    priority: int
    max_failures: int
    deadlines: Deadlines
    owner: str = Field(description="the name of the token that it was submitted with")
    seed: int
    step: int
    total_steps: int | None
    eta_s: float | None = Field(description="seconds that training still takes at its pace; null unless it runs")
    attempt: int
    metrics: dict[str, float]
    created_at: AwareDatetime
    updated_at: AwareDatetime


class CheckpointResource(Resource):
    """A committed checkpoint. Abandoned ones were left behind by a restart and are in no average."""

    seq: int
    step: int
    epoch: int
    attempt: int
    lr: float | None
    metrics: dict[str, float]
    size_bytes: int
    sha256: str | None = Field(description="of the raw weights")
    is_abandoned: bool
    created_at: AwareDatetime | None


class Weights(Resource):
    """A published weights file; `url` is this very content, whatever is published later."""

    sha256: str
    size_bytes: int
    url: str


class EvaluationSet(Resource):
    """Held-out metrics: the newest raw checkpoint, the average, and the average with averaged statistics.

    Each has ``step`` and the recipe's metrics, such as ``loss`` and ``accuracy``. `comparison` is averaged minus
    raw on the same samples; `won` is its verdict, null where they could not be compared.
    """

    raw: dict[str, int | float] | None = None
    averaged: dict[str, int | float] | None = None
    before_recalibration: dict[str, int | float] | None = None
    comparison: Comparison | None = None
    won: Literal["averaged", "raw", "tie"] | None = None


class RebuiltFrom(Resource):
    """How an average began that was summed from what was kept: from so many files, this far from its rule."""

    num_parts: int
    profile_error: float
    noise_gain: float


class AverageResource(Resource):
    """An average. `coefficients` maps each step in it to its weight; they sum to 1."""

    name: str
    rule: str
    generation: int | None
    n_averaged: int
    first_step: int | None
    last_step: int | None
    behind: int = Field(description="surviving checkpoints that have not been looked at yet")
    coefficients: dict[int, float]
    evaluation: EvaluationSet
    batchnorm: BatchNormSummary | None
    rejected: list[SetAside]
    skipped: list[SetAside]
    weights: Weights | None
    published_generation: int | None = Field(description="the generation that weights and evaluation are of")
    best_generation: int | None = Field(description="the one with the lowest held-out loss so far")
    rebuilt: RebuiltFrom | None = Field(description="null where every checkpoint in it was folded")
    warnings: list[str] = Field(default_factory=list, description="what may make it worse than it could be")


class Coefficient(Resource):
    """One checkpoint in an average, and its part in it."""

    step: int
    coefficient: float
    sha256: str | None = Field(description="of the checkpoint's weights, where they were folded one by one")


class Coefficients(Resource):
    """What published weights are made of: the coefficients sum to 1, and are ordered by step."""

    run_id: str
    average: str
    generation: int
    rule: str
    sha256: str = Field(description="of the published weights")
    data: list[Coefficient]


class Prediction(Resource):
    """What adding an average takes and gives, worked out before anything is read.

    ``replay`` folds all its checkpoints again, and is exact. ``rebuild`` sums what is kept: `profile_error` is how
    far its coefficients are from the rule's, as a part of them, and `noise_gain` how much larger rounding errors
    can come out. `reads` counts files, checkpoints and states.
    """

    how: Literal["replay", "rebuild"]
    profile_error: float
    noise_gain: float
    reads: int
    read_bytes: int


class AddedAverage(AverageResource):
    """An average that was added, or would be, with what that takes."""

    prediction: Prediction


class LogLine(Resource):
    """One line that a rank wrote."""

    attempt: int
    rank: str
    text: str


class Page(Resource, Generic[T]):
    """Part of a list. `next` is the `after` of the page that follows; null when there is none."""

    data: list[T]
    has_more: bool
    next: str | None


class Feed(Resource, Generic[T]):
    """Part of something that grows. `next` is where to go on, also when nothing more is there yet."""

    data: list[T]
    has_more: bool
    next: str | None


class EventFeed(Resource):
    """Part of a run's log, as recorded; `next` is the seq to go on after."""

    data: list[dict[str, Any]]
    has_more: bool
    next: int


class Listing(Resource, Generic[T]):
    """A whole list."""

    data: list[T]


class Fault(Resource):
    """One thing wrong with a request: where, and what."""

    pointer: str
    message: str


class PackageResource(BaseModel):
    """User code that is kept; `package` is what a submission names."""

    package: str
    size_bytes: int
    unpacked_bytes: int
    num_files: int
    modules: list[str]


class Problem(Resource):
    """A refusal or failure (RFC 9457); `code` is stable, the texts are not."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: Annotated[str | None, Field(description="what to do about it")] = None
    errors: list[Fault] = Field(default_factory=list)
