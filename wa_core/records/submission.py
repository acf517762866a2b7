"""What a user asks for: the body of a submission, and the run that it becomes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, JsonValue, StringConstraints, model_validator

from wa_core.records.base import FORMAT, MAX_AVERAGES, Name, Record, Request, new_write_id
from wa_core.records.training import TrainingOptions


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
    training: TrainingOptions = Field(default_factory=TrainingOptions)
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
