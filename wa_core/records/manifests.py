"""What is recorded of an average: its generations, where each came from, how each was assessed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, StringConstraints, model_validator

from wa_core.records.base import FORMAT, Name, Record, Sha256, new_write_id
from wa_core.records.entries import FileRef

#: What is told apart in one record; of models with more layers, those under one path are told together.
MAX_LAYERS = 512
MAX_LAYER_CHARS = 300

LayerName = Annotated[str, StringConstraints(max_length=MAX_LAYER_CHARS)]


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


class BatchNormDrift(Record):
    """How far the statistics that came with an average were from those of its own weights, in one BatchNorm layer.

    `mean_shift` is the root mean square over channels of the difference of the means, in units of the new standard
    deviation. `variance_ratio` is the geometric mean over channels of new variance by old; channels without
    variance are left out, and it is None where all are.
    """

    name: LayerName
    mean_shift: float = Field(ge=0)
    variance_ratio: float | None = Field(default=None, gt=0)


class LayerDistance(Record):
    """The L2 distance between averaged and raw parameters of one module (or of several under one path).

    `relative` is the distance by the norm of the raw ones, None where that is 0. `size` counts numbers.
    """

    name: LayerName
    distance: float = Field(ge=0)
    relative: float | None = Field(default=None, ge=0)
    size: int = Field(ge=0)


class BatchNormSummary(Record):
    """What recalibration did: ``recalibrated``, ``skipped`` (no BatchNorm layers) or ``failed``."""

    status: Literal["recalibrated", "skipped", "failed"]
    num_layers: int = Field(default=0, ge=0)
    num_batches: int = Field(default=0, ge=0)
    num_samples: int = Field(default=0, ge=0)
    code: str | None = None
    message: str = ""
    layers: list[BatchNormDrift] = Field(default_factory=list, max_length=MAX_LAYERS)


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
    `where` is whether tasks on the Ray cluster measured, or one process beside the averager.
    `layers` says where the average is away from the raw weights; it is empty without those, or without a recipe.
    """

    raw: Evaluation | None = None
    averaged: Evaluation | None = None
    before_recalibration: Evaluation | None = None
    batchnorm: BatchNormSummary
    comparison: Comparison | None = None
    data_sha256: Sha256 | None = None
    layers: list[LayerDistance] = Field(default_factory=list, max_length=MAX_LAYERS)
    took_s: float = Field(default=0.0, ge=0)
    where: Literal["process", "ray"] = "process"


class RebuiltPart(Record):
    """A file that a rebuilt average was summed from: a checkpoint's weights, or the state of another average."""

    file: FileRef
    weight: float


class Rebuilt(Record):
    """How an average began that was made from what was kept, not from every checkpoint (ADR 14).

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
    """What is served of one generation, by file name, and how it measures: a record of its own (ADR 8).

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
