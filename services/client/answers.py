"""What the service answers, as frozen objects: `run.state`, `average.evaluation.averaged`.

An answer is also a read-only mapping of the JSON that it was made from (`run["state"]`, `dict(run)`), so that
nothing is lost of a newer service that says more than this client knows. It knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime  # noqa: TC003  pydantic reads the annotations at run time
from typing import Any, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

#: States that a run never leaves.
TERMINAL_STATES = frozenset({"succeeded", "failed", "cancelled"})

T = TypeVar("T")


class Answer(BaseModel, Mapping[str, Any]):
    """Base of all answers: immutable; fields that this client does not know are kept."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=(), defer_build=True)

    _said: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, said: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:  # noqa: ANN401  whatever came
        answer = handler(said)
        if isinstance(said, dict):
            answer._said = said  # noqa: SLF001  its own
        return answer

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401  JSON
        return self._said[name]

    def __iter__(self) -> Iterator[str]:  # type: ignore[override]  # the names, as of any mapping
        return iter(self._said)

    def __len__(self) -> int:
        return len(self._said)

    def __eq__(self, other: object) -> bool:
        return self._said == dict(other) if isinstance(other, Mapping) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as of any mapping


class Page(Answer, Generic[T]):
    """Part of a list; `next` is the `after` of what follows."""

    data: list[T]
    has_more: bool = False
    next: str | int | None = None


class Version(Answer):
    """Of the service, and of the format of its bucket."""

    version: str
    format: int


class Readiness(Answer):
    """Whether the service is ready, and each check of its storage."""

    status: str
    checks: dict[str, Any] = Field(default_factory=dict)


class Reason(Answer):
    """Why a run failed, is recovering or is made to wait."""

    code: str
    message: str = ""


class Run(Answer):
    """A run, as it is at a moment."""

    run_id: str
    state: str
    created_at: datetime
    updated_at: datetime
    desired_state: str = "succeeded"
    averaging_state: str = "waiting"
    reason: Reason | None = None
    trainer: str = "service"
    recipe: str | None = None
    package: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    scaling: dict[str, Any] = Field(default_factory=dict)
    checkpoint: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)
    averages: list[dict[str, Any]] = Field(default_factory=list)
    labels: dict[str, str] = Field(default_factory=dict)
    priority: int = 50
    owner: str = ""
    seed: int = 0
    step: int = 0
    total_steps: int | None = None
    eta_s: float | None = None
    attempt: int = 0
    metrics: dict[str, float] = Field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in TERMINAL_STATES


class Event(Answer):
    """One entry of a run's log; what else it says depends on its `kind`: ``event["step"]``."""

    seq: int
    at: datetime
    kind: str
    state: str = ""
    attempt: int = 0


class LogLine(Answer):
    """One line that a rank wrote."""

    text: str
    attempt: int = 0
    rank: str = "0"


class Metrics(Answer):
    """What was measured at one step; the values by name: ``metrics["loss"]``."""

    step: int | None = None
    attempt: int = 0


class Checkpoint(Answer):
    """A committed checkpoint; an abandoned one was left behind by a restart and is in no average."""

    seq: int
    step: int
    epoch: int = 0
    attempt: int = 0
    lr: float | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    size_bytes: int = 0
    sha256: str | None = None
    is_abandoned: bool = False
    created_at: datetime | None = None


class Comparison(Answer):
    """Averaged minus raw on the same held-out samples, with its interval; `won` is the verdict."""

    metric: str
    difference: float
    low: float
    high: float
    confidence: float = 0.95
    won: str | None = None


class Evaluation(Answer):
    """Held-out metrics by name of the raw weights, the averaged, and the averaged before recalibration."""

    raw: dict[str, float] | None = None
    averaged: dict[str, float] | None = None
    before_recalibration: dict[str, float] | None = None
    comparison: Comparison | None = None
    won: str | None = None


class Weights(Answer):
    """A published file of averaged weights."""

    sha256: str
    size_bytes: int
    url: str


class Average(Answer):
    """An average, or one generation of it; `coefficients` maps each step in it to its weight."""

    name: str
    rule: str
    generation: int | None = None
    published_generation: int | None = None
    best_generation: int | None = None
    n_averaged: int = 0
    first_step: int | None = None
    last_step: int | None = None
    behind: int = 0
    coefficients: dict[int, float] = Field(default_factory=dict)
    evaluation: Evaluation = Field(default_factory=Evaluation)
    batchnorm: dict[str, Any] | None = None
    rejected: list[dict[str, Any]] = Field(default_factory=list)
    skipped: list[dict[str, Any]] = Field(default_factory=list)
    layers: list[dict[str, Any]] | None = None
    weights: Weights | None = None
    rebuilt: dict[str, Any] | None = None
    warnings: list[str] = Field(default_factory=list)


class Prediction(Answer):
    """What adding an average takes and gives, worked out before any weights are read."""

    how: str
    profile_error: float = 0.0
    noise_gain: float = 1.0
    reads: int = 0
    read_bytes: int = 0


class AddedAverage(Average):
    """An average that was added, or would be."""

    prediction: Prediction


class Preview(Answer):
    """What another rule would make of a run's checkpoints; nothing was added.

    `prediction` is None where it cannot be made from what is kept; `reason` says why.
    """

    rule: str
    coefficients: dict[int, float] = Field(default_factory=dict)
    prediction: Prediction | None = None
    reason: Reason | None = None


class Generation(Answer):
    """One published state of an average, and how long after its last checkpoint it was out."""

    generation: int
    step: int | None = None
    last_step: int | None = None
    n_averaged: int = 0
    created_at: datetime | None = None
    published_at: datetime | None = None
    lag_s: float | None = None
    evaluation: Evaluation | None = None
    batchnorm: dict[str, Any] | None = None


class Landscape(Answer):
    """The loss around an average: `losses` along a line (a list) or on a plane (a list of rows)."""

    landscape_id: str
    kind: str
    state: str
    points: int = 0
    progress: float = 0.0
    reason: Reason | None = None
    generation: int | None = None
    axis: list[float] = Field(default_factory=list)
    axis_y: list[float] = Field(default_factory=list)
    losses: list[Any] = Field(default_factory=list)
    markers: list[dict[str, Any]] = Field(default_factory=list)


class Verification(Answer):
    """Whether a published average is, to the last bit, that of its checkpoints; if not, `reason` says why."""

    verification_id: str
    generation: int
    state: str
    progress: float = 0.0
    is_equal: bool | None = None
    reason: Reason | None = None
    num_checkpoints: int = 0
    num_recalibrated: int = 0
    took_s: float | None = None


class Predicted(Answer):
    """What an average says of some inputs, and which of its published generations said so."""

    predictions: list[Any]
    generation: int | None = None


class Delivery(Answer):
    """One event for one of a run's webhooks, and what became of the message."""

    delivery_id: str
    webhook: int
    host: str
    event: str
    outcome: str
    at: datetime | None = None
    status: int | None = None
    num_tries: int | None = None
    message: str = ""


class Token(Answer):
    """A token of the service; `secret` only in the answer that made it."""

    token_id: str
    name: str
    scopes: list[str] = Field(default_factory=list)
    prefix: str = ""
    last_four: str = ""
    created_at: datetime | None = None
    expires_at: datetime | None = None
    secret: str | None = Field(default=None, repr=False)


class Package(Answer):
    """User code that the service keeps; `package` is what a submission names."""

    package: str
    size_bytes: int = 0
    modules: list[str] = Field(default_factory=list)
