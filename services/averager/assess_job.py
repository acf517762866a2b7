"""A job for the assess process: which averages of a run to recalibrate and measure, and what comes of it.

It knows records and where the job's files are; no process. The invariant: a job does not change once it is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.averager.protocol import JobFile, job_path, raw_path, value_path

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from wa_core.records import Assessment, AverageManifest, RunRequest


@dataclass(frozen=True, slots=True)
class AssessJob:
    """Averages of one run to recalibrate and measure, beside the newest raw weights.

    Attributes:
        run_id: the run.
        request: names the recipe, its config and its seed.
        folder: the job's own, on scratch disk; whoever made it removes it. Weights are in it already, in the
            checkpoints' dtypes, at `value_path` for each average and, unless `raw_step` is None, at `raw_path`.
        raw_step: the step of the raw weights.
        averages: the generations, by average name.
        checkpoints: step -> SHA-256 of the weights of that checkpoint, for the served files' provenance.
        code: the folder that the recipe is imported from, when the run came with a package.
    """

    run_id: str
    request: RunRequest
    folder: Path
    raw_step: int | None
    averages: Mapping[str, AverageManifest]
    checkpoints: Mapping[int, str] = field(default_factory=dict)
    code: Path | None = None

    @property
    def raw_path(self) -> Path:
        """Where the raw weights must be."""
        return raw_path(self.folder)

    def value_path(self, name: str) -> Path:
        """Where the value of average `name` must be."""
        return value_path(self.folder, name)

    def write(self) -> None:
        """Write the job down where the assess process reads it.

        Raises:
            OSError: the disk is full, or the folder is gone.
        """
        about = JobFile(
            recipe=self.request.recipe,
            code=str(self.code) if self.code else None,
            config=self.request.config,
            seed=self.request.seed,
            has_raw=self.raw_step is not None,
            averages=list(self.averages),
        )
        job_path(self.folder).write_text(about.model_dump_json())


@dataclass(frozen=True, slots=True)
class Assessed:
    """One generation, assessed; `files` are those to serve, inside the job's folder, by the names to serve."""

    manifest: AverageManifest
    assessment: Assessment
    files: Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """A job's outcome. An average whose files could not be written, for want of disk say, is not in `assessed`."""

    run_id: str
    assessed: tuple[Assessed, ...]
    folder: Path
