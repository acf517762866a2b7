"""What the averager and its assess process say to each other: a job in a file, findings one JSON line each.

It knows records; no process, no torch. The invariant: what comes from the assess process is parsed into these or
not believed. Tensors travel as safetensors files in the job's folder, under names that this module gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, JsonValue, TypeAdapter

from wa_core.records import MAX_LAYERS, BatchNormSummary, Comparison, LayerDistance, Record, Sha256

if TYPE_CHECKING:
    from pathlib import Path

MESSAGE_LIMIT = 2000


class JobFile(Record):
    """One job: a recipe, and which weights in the folder to measure with it.

    `code` is the folder that the recipe is imported from, when it came in a package.
    """

    recipe: str
    code: str | None = None
    config: dict[str, JsonValue]
    seed: int
    has_raw: bool
    averages: list[str]


class RawFound(Record):
    """First finding of a job: how the raw weights measure, and a digest of the data that all is measured on.

    `metrics` is None where there are no raw weights or where they could not be measured.
    """

    kind: Literal["raw"] = "raw"
    metrics: dict[str, float] | None
    data_sha256: Sha256


class AverageFound(Record):
    """What was found out about one average. With `has_buffers`, its recalibrated buffers are in a file."""

    kind: Literal["average"] = "average"
    name: str
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None
    batchnorm: BatchNormSummary
    comparison: Comparison | None = None
    layers: list[LayerDistance] = Field(default_factory=list, max_length=MAX_LAYERS)
    has_buffers: bool = False


class JobFailed(Record):
    """Last finding of a job that cannot be done, such as one whose recipe cannot be built."""

    kind: Literal["failed"] = "failed"
    message: Annotated[str, Field(max_length=MESSAGE_LIMIT)]


class JobDone(Record):
    """Last finding of a job: there is one of each average."""

    kind: Literal["done"] = "done"


Finding = Annotated[RawFound | AverageFound | JobFailed | JobDone, Field(discriminator="kind")]
finding_adapter: TypeAdapter[Finding] = TypeAdapter(Finding)


def job_path(folder: Path) -> Path:
    """Where a job is written down."""
    return folder / "job.json"


def raw_path(folder: Path) -> Path:
    """Where the raw weights are."""
    return folder / "_raw.safetensors"  # no average can have this name


def value_path(folder: Path, name: str) -> Path:
    """Where the value of average `name` is."""
    return folder / f"{name}.safetensors"


def buffers_path(folder: Path, name: str) -> Path:
    """Where the recalibrated buffers of average `name` are."""
    return folder / f"{name}.buffers.safetensors"
