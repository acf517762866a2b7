"""What is recorded of a loss landscape: what was asked for, who works on it, and what came of it (ADR 26).

A landscape is the loss along a line, or over a plane, through weights of a run.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from wa_core.records.base import Record, Request
from wa_core.records.jobs import JobAttempt, JobPart, JobRecord, JobResult

LandscapeKind = Literal["line", "plane"]

#: Points of a line, and of one side of a plane.
DEFAULT_POINTS: dict[str, int] = {"line": 31, "plane": 15}
MIN_POINTS = 3
MAX_POINTS: dict[str, int] = {"line": 201, "plane": 41}

Losses = list[float | None]


class LandscapeRequest(Request):
    """The body of a request for a landscape.

    A ``line`` goes from the newest raw weights through the average, and a quarter of the way beyond both. A
    ``plane`` goes through the oldest kept checkpoint in the average, the newest raw weights and the average, with
    `points` to a side.
    """

    kind: LandscapeKind
    points: int | None = Field(
        default=None, ge=MIN_POINTS, le=max(MAX_POINTS.values()), description="of a line 31, of a plane 15"
    )

    @model_validator(mode="after")
    def _is_bounded(self) -> LandscapeRequest:
        most = MAX_POINTS[self.kind]
        if self.points is not None and self.points > most:
            raise ValueError(f"points is {self.points}; a {self.kind} has {MIN_POINTS} to {most}")
        return self

    @property
    def num_points(self) -> int:
        """How many points the line, or a side of the plane, has."""
        return self.points or DEFAULT_POINTS[self.kind]


class _OfLandscape(JobPart):
    landscape_id: str

    @property
    def job_id(self) -> str:
        """The landscape's id."""
        return self.landscape_id


class LandscapeRecord(_OfLandscape, JobRecord):
    """A landscape that somebody wants of an average. `points` is of the line, or of one side of the plane."""

    kind: LandscapeKind
    points: int = Field(ge=MIN_POINTS)


class LandscapeAttempt(_OfLandscape, JobAttempt):
    """Somebody has taken a landscape."""


class MarkedPoint(Record):
    """Weights of the run, by their coordinates in the landscape; `step` is the last one in them.

    `loss` is the held-out one there, None where it is not finite. On a line it is `y` as well, to be drawn at.
    """

    label: str
    x: float
    y: float = 0.0
    step: int
    loss: float | None = None


class LandscapeResult(_OfLandscape, JobResult):
    """What came of a landscape.

    `x` are the points of a line as `t` (0 is raw, 1 is the average), or a plane's coordinates in the distance of
    weights, with `y`. `heldout` is the loss on held-out data: of a line one row, of a plane a row for each `y`;
    `train` is that on calibration data. None stands for a loss that is not finite. `num_heldout` and `num_train`
    count the samples.
    """

    generation: int | None = None
    x: list[float] = Field(default_factory=list)
    y: list[float] = Field(default_factory=list)
    heldout: list[Losses] = Field(default_factory=list)
    train: list[Losses] = Field(default_factory=list)
    markers: list[MarkedPoint] = Field(default_factory=list)
    is_recalibrated: bool = False
    num_heldout: int = Field(default=0, ge=0)
    num_train: int = Field(default=0, ge=0)
