"""What the API answers, as pydantic models: the public shape of runs, averages, checkpoints and pages.

These are the API's own; the records in the bucket may change behind them. They are built in
`services.api.answers.resources` and know no store.
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
    LandscapeKind,
    LayerDistance,
    Losses,
    MarkedPoint,
    RunState,
    Scaling,
    Scope,
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
    layers: list[LayerDistance] = Field(default_factory=list, description="how far it is from the raw weights")
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


class AveragePreview(Resource):
    """What an average by `rule` would be of the checkpoints so far, and what adding it would take.

    `prediction` is null where it cannot be made from what is kept; `reason` then says why, and what to ask for.
    """

    rule: str
    coefficients: dict[int, float]
    prediction: Prediction | None
    reason: Reason | None


class GenerationResource(Resource):
    """One generation in an average's history.

    `step` is that of the newest checkpoint it has looked at, `last_step` that of the newest one in it.
    `checkpoint_committed_at` is when the latter was whole in the bucket, `created_at` when the generation was,
    and `published_at` when its weights could be downloaded: `lag_s` is from the first to the last of these.
    `batchnorm` is without layers; the average itself shows those.
    """

    generation: int
    step: int | None
    n_averaged: int
    created_at: AwareDatetime
    last_step: int | None
    checkpoint_committed_at: AwareDatetime | None
    published_at: AwareDatetime | None
    lag_s: float | None
    evaluation: EvaluationSet
    batchnorm: BatchNormSummary | None


class GenerationPage(Resource):
    """Part of an average's history, the oldest first; `next` is the generation to go on after, also at the end."""

    data: list[GenerationResource]
    has_more: bool
    next: int


class LandscapeResource(Resource):
    """The loss along a line, or over a plane, through weights of a run.

    A line goes from the raw weights (0 on its `axis`) to the average (1) and a quarter beyond both; `losses` is a
    list. A plane has coordinates `axis` and `axis_y` in the distance of weights; `losses` has a row for each of
    `axis_y`. `train_losses` are on calibration data, in the same form. A loss that is not finite is null. In a
    list of landscapes these are empty.
    """

    landscape_id: str
    kind: LandscapeKind
    points: int = Field(description="of the line, or of one side of the plane")
    state: Literal["queued", "running", "succeeded", "failed"]
    progress: float = Field(ge=0, le=1)
    reason: Reason | None = Field(description="why it failed")
    generation: int | None = Field(description="of the average that it goes through")
    axis: list[float] = Field(default_factory=list)
    axis_y: list[float] = Field(default_factory=list)
    losses: Losses | list[Losses] = Field(default_factory=list)
    train_losses: Losses | list[Losses] = Field(default_factory=list)
    markers: list[MarkedPoint] = Field(default_factory=list)
    is_recalibrated: bool = Field(default=False, description="whether BatchNorm was, at every point")
    num_heldout: int = Field(default=0, description="samples behind each of `losses`")
    num_train: int = Field(default=0, description="samples behind each of `train_losses`")
    created_at: AwareDatetime
    finished_at: AwareDatetime | None = None


class VerificationResource(Resource):
    """Whether an average is what its record says, recomputed from the kept checkpoints.

    A verification that ``succeeded`` has a finding: `is_equal`, or `reason` says what differs. One that ``failed``
    has none, and `reason` says why. Of `num_checkpoints` each was folded again; `num_recalibrated` buffers of the
    weights are recalibration's own, and not compared.
    """

    verification_id: str
    generation: int
    state: Literal["queued", "running", "succeeded", "failed"]
    progress: float = Field(ge=0, le=1)
    is_equal: bool | None
    reason: Reason | None = Field(description="what differs, or why it could not be verified")
    num_checkpoints: int = 0
    is_state_equal: bool | None = Field(default=None, description="null where no accumulators are stored")
    is_served_equal: bool | None = Field(default=None, description="of the weights to download")
    num_recalibrated: int = 0
    created_at: AwareDatetime
    finished_at: AwareDatetime | None = None
    took_s: float | None = None


class DeliveryResource(Resource):
    """One event for one webhook: what became of the message. `at` is when that was written down.

    `status` is the receiver's last one; `message` says why there is none. Addresses are not shown.
    """

    delivery_id: str
    webhook: int = Field(description="its place in the submission's list, from 0")
    host: str
    event: str
    event_id: str = Field(description="the end of the message's `webhook-id`")
    outcome: Literal["pending", "delivered", "given_up"]
    at: AwareDatetime | None = None
    status: int | None = None
    num_tries: int | None = Field(default=None, description="null while pending, or if nobody counted")
    message: str = ""


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


class TokenResource(Resource):
    """A token that was made here. Its secret begins with `prefix` and ends with `last_four`."""

    token_id: str
    name: str = Field(description="the owner of the runs that it submits")
    prefix: str
    last_four: str
    scopes: list[Scope]
    created_at: AwareDatetime
    expires_at: AwareDatetime | None


class NewToken(TokenResource):
    """A token that was just made; `secret` is what callers send as bearer token, and is never shown again."""

    secret: str


class Problem(Resource):
    """A refusal or failure (RFC 9457); `code` is stable, the texts are not."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    hint: Annotated[str | None, Field(description="what to do about it")] = None
    instance: Annotated[str | None, Field(description="names this one occurrence, as a URN of `request_id`")] = (
        None
    )
    request_id: Annotated[
        str | None, Field(description="`X-Request-Id` of the answer; the service's log has it")
    ] = None
    errors: list[Fault] = Field(default_factory=list)
