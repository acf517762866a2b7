"""How a run is to be trained, whatever its recipe: precision, accumulation, clipping, evaluation, learning rates.

Everything here has a default that changes nothing, so a run of an older version means what it meant.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from wa_core.records.base import Request

_Rate = Annotated[float, Field(gt=0, le=1e6)]
_Steps = Annotated[int, Field(ge=0, lt=10**12)]


class ConstantRate(Request):
    """From `start_step` on the rates go to `lr` within `anneal_steps` steps, and stay there (as torch's `SWALR`).

    Before that they are the recipe's own.
    """

    kind: Literal["constant"]
    lr: _Rate
    start_step: _Steps
    anneal_steps: _Steps = 10
    anneal: Literal["linear", "cosine"] = "cosine"


class CyclicalRate(Request):
    """From `start_step` on the rates fall from `lr_max` to `lr_min` again and again, once in `cycle_steps` steps.

    Checkpoints are taken at the ends of cycles from there on, and at the last step; nowhere else. Before that the
    rates are the recipe's own. Source: Izmailov et al. 2018, section 3.2.
    """

    kind: Literal["cyclical"]
    lr_max: _Rate
    lr_min: _Rate
    cycle_steps: int = Field(ge=1, lt=10**9)
    start_step: _Steps = 0

    @model_validator(mode="after")
    def _falls(self) -> CyclicalRate:
        if self.lr_min > self.lr_max:
            raise ValueError(f"lr_min {self.lr_min:g} is above lr_max {self.lr_max:g}; a cycle begins at lr_max")
        return self


class WarmupStableRate(Request):
    """The optimizer's own rates, after a linear warm-up, until the end: averaging takes the place of a decay."""

    kind: Literal["warmup_stable"]
    warmup_steps: _Steps = 0


LrSchedule = Annotated[ConstantRate | CyclicalRate | WarmupStableRate, Field(discriminator="kind")]


class EarlyStop(Request):
    """Training ends after `patience` evaluations in a row whose held-out loss was not better by `min_delta`."""

    patience: int = Field(ge=1, le=1_000_000)
    min_delta: float = Field(default=0.0, ge=0, le=1e9)


class TrainingOptions(Request):
    """What training can be told whatever the recipe is.

    A step stays one step of the optimizer: its batch is cut into `accumulate_batches` parts, whose gradients are
    summed. Gradients longer than `clip_norm` are scaled down to it. `evaluate_every_steps` measures the raw
    weights on held-out data during training.
    """

    precision: Literal["float32", "bf16", "float16"] = "float32"
    accumulate_batches: int = Field(default=1, ge=1, le=100_000)
    clip_norm: float | None = Field(default=None, gt=0, le=1e9)
    deterministic: bool = False
    evaluate_every_steps: int | None = Field(default=None, ge=1, le=10_000_000)
    early_stop: EarlyStop | None = None
    tensorboard: bool = False
    lr_schedule: LrSchedule | None = Field(default=None, description="null: the recipe's own")

    @model_validator(mode="after")
    def _early_stop_is_measured(self) -> TrainingOptions:
        if self.early_stop is not None and self.evaluate_every_steps is None:
            raise ValueError(
                "early_stop goes by held-out loss; set evaluate_every_steps to say when it is measured"
            )
        return self
