"""What the averager and its landscape process say to each other: a job in a file, findings one JSON line each.

It knows records; no process, no torch. The invariant: what comes from the landscape process is parsed into these
or not believed. Weights travel as safetensors files in the job's folder, in the order that the job says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, JsonValue, TypeAdapter

from services.averager.protocol import MESSAGE_LIMIT
from wa_core.records import LandscapeKind, Losses, Record

if TYPE_CHECKING:
    from pathlib import Path


class LandscapeJobFile(Record):
    """One job: a recipe, and how many weights in the folder to go through.

    Of a line the newest raw weights and the average; of a plane the oldest in the average, the newest raw ones and
    the average. `code` is the folder that the recipe is imported from, when it came in a package.
    """

    recipe: str
    code: str | None = None
    config: dict[str, JsonValue]
    seed: int
    kind: LandscapeKind
    points: int
    max_samples: int


class PointDone(Record):
    """So many points of all are done."""

    kind: Literal["point"] = "point"
    done: int = Field(ge=0)
    of: int = Field(ge=1)


class LandscapeFound(Record):
    """Last finding of a job that went well; see `LandscapeResult`.

    `places` are the coordinates of the weights, `losses_there` their held-out losses.
    """

    kind: Literal["found"] = "found"
    x: list[float]
    y: list[float]
    heldout: list[Losses]
    train: list[Losses]
    places: list[tuple[float, float]]
    losses_there: Losses
    is_recalibrated: bool
    num_heldout: int
    num_train: int


class LandscapeFailed(Record):
    """Last finding of a job that cannot be done."""

    kind: Literal["failed"] = "failed"
    code: str
    message: Annotated[str, Field(max_length=MESSAGE_LIMIT)]


LandscapeFinding = Annotated[PointDone | LandscapeFound | LandscapeFailed, Field(discriminator="kind")]
landscape_finding_adapter: TypeAdapter[LandscapeFinding] = TypeAdapter(LandscapeFinding)


def landscape_job_path(folder: Path) -> Path:
    """Where a job is written down."""
    return folder / "job.json"


def weights_path(folder: Path, number: int) -> Path:
    """Where the weights of this number (from 0) are."""
    return folder / f"{number}.safetensors"
