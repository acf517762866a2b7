"""What the simulator knows of the averager: how one is built, and where the finished average lies.

The one place to change when the averager's constructor or the format of its files does.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from services.averager.assess_job import Assessed, FinishedJob
from services.averager.scratch import Scratch
from services.averager.worker import Averager
from support.averaging import assessment_of
from wa_core.averaging.rules import parse_rule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.tensors import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import torch

    from services.averager.assess_job import AssessJob
    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

#: More blobs are never on their way to one record at once.
BLOBS_PER_COMMIT = 1


class InstantAssessor:
    """Finishes at once, and serves the average as it is: what assessing costs would be most of a simulation."""

    def __init__(self) -> None:
        self._job: AssessJob | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do."""
        return self._job is None

    def start(self, job: AssessJob) -> None:
        """Take a job."""
        self._job = job

    def poll(self) -> FinishedJob | None:
        """The outcome, for every average."""
        if self._job is None:
            return None
        job, self._job = self._job, None
        found = assessment_of(raw=2.0, averaged=1.0)
        assessed = [
            Assessed(manifest, found, {"model.safetensors": job.value_path(name)})
            for name, manifest in job.averages.items()
        ]
        return FinishedJob(job.run_id, tuple(assessed), job.folder)

    def close(self) -> None:
        """Forget the job."""
        self._job = None


@contextmanager
def running_averager(
    store: ObjectStore, *, clock: Clock, folder: Path, publish_every_folds: int
) -> Iterator[Averager]:
    """A fresh averager, as a process that just started has it; its memory and scratch space die with it."""
    with Scratch(folder) as scratch:
        yield Averager(
            store,
            clock=clock,
            assessor=InstantAssessor(),
            scratch=scratch,
            publish_every_folds=publish_every_folds,
        )


def stored_value(objects: Mapping[str, bytes], manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The average that a generation's shadow file holds."""
    stored = read_checkpoint([objects[manifest["shadow"]["key"]]])
    return ShadowWeights.restore(parse_rule(manifest["rule"]), stored.tensors, stored.metadata).value()


def served_value(objects: Mapping[str, bytes], record: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that a user would download of an assessed generation."""
    return read_checkpoint([objects[record["files"]["model.safetensors"]["key"]]]).tensors
