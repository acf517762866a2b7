"""What a user asks for: the body of a submission, and the run that it becomes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, JsonValue, StringConstraints, model_validator

from wa_core.records.base import DEFAULT_OWNER, FORMAT, MAX_AVERAGES, Name, Record, Request, Sha256, new_write_id
from wa_core.records.training import TrainingOptions
from wa_core.records.webhooks import MAX_WEBHOOKS, Webhook


class Scaling(Request):
    """How many workers train, and on what.

    With `min_workers` an attempt takes as many workers as there is room for, from that many up to `num_workers`.
    """

    num_workers: int = Field(default=2, ge=1, le=1024)
    min_workers: int | None = Field(default=None, ge=1, le=1024)
    use_gpu: bool = False

    @model_validator(mode="after")
    def _fewest_is_no_more(self) -> Scaling:
        if self.fewest > self.num_workers:
            raise ValueError(
                f"min_workers {self.min_workers} is above num_workers {self.num_workers}; raise num_workers"
            )
        return self

    @property
    def fewest(self) -> int:
        """The fewest workers that the run may train with."""
        return self.num_workers if self.min_workers is None else self.min_workers


class CheckpointPolicy(Request):
    """When checkpoints are taken, and which of them are kept (ADR 11).

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


class Deadlines(Request):
    """How long a run may take, in seconds; None: as long as it takes.

    `queue_s` is how long it may wait for its first attempt, `run_s` how long its attempts may take together, and
    `stall_s` how long an attempt may go without a step before it is ended and tried again.
    """

    queue_s: float | None = Field(default=None, gt=0, le=1e9)
    run_s: float | None = Field(default=None, gt=0, le=1e9)
    stall_s: float = Field(default=900.0, gt=0, le=1e9)


class Resumption(Request):
    """The body of a resume: how the run goes on.

    `from_step` is a step to go back to; None goes on from the newest checkpoint. From there on every learning rate
    is multiplied by `lr_scale`, and the next `skip_batches` batches of the data are left out.
    """

    from_step: int | None = Field(default=None, ge=0, lt=10**12)
    lr_scale: float = Field(default=1.0, gt=0, le=1e6)
    skip_batches: int = Field(default=0, ge=0, lt=10**9)

    @property
    def changes_something(self) -> bool:
        """Whether this is more than going on as before."""
        return self != Resumption()


class AverageRequest(Request):
    """One average that the run should have.

    `accumulator_dtype` is what the folds are summed in; float32 halves the memory and loses a few units in
    the last place over many folds (ADR 5).
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
    deadlines: Deadlines = Field(default_factory=Deadlines)
    webhooks: list[Webhook] = Field(default_factory=list, max_length=MAX_WEBHOOKS)
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


#: The recipe of a run that has none: its own trainer knows what is trained, and nobody else needs to.
NO_RECIPE = "none:none"


class RunSpec(Record):
    """A submitted run: what was asked for, when and by whom. Written once, as `run.json`.

    `traceparent` (W3C) is the trace that the submission belongs to, if any; what is done for the run joins it.
    `trainer` is ``own`` where the user's own loop trains: no runner ever claims such a run.
    """

    format: Literal[1] = FORMAT
    run_id: str
    write_id: str = Field(default_factory=new_write_id)
    created_at: AwareDatetime
    traceparent: str | None = Field(default=None, max_length=64)
    owner: Name = DEFAULT_OWNER
    trainer: Literal["service", "own"] = "service"
    request: RunRequest


class KeyedSubmission(Record):
    """Which run an Idempotency-Key stands for, and what was submitted under it. Written once, before the run is.

    Whoever sends the key again finishes the submission that it began, to the very same records.
    """

    format: Literal[1] = FORMAT
    write_id: str = Field(default_factory=new_write_id)
    run_id: str
    created_at: AwareDatetime
    body_sha256: Sha256
