"""What tests of the averager share: a scripted assessor, a counting and a crashing store, oracles."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from services.averager.assess_job import Assessed, FinishedJob
from services.averager.publication import Buffers, ServedWeights, provenance
from services.averager.scratch import Scratch
from services.averager.worker import Averager
from wa_core.averaging.files.sources import open_source
from wa_core.catalog.averages import Generations
from wa_core.clock import ManualClock
from wa_core.records import Assessment, BatchNormSummary, Evaluation
from wa_core.tensors import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.averager.assess_job import AssessJob
    from support.runs import HandmadeRun
    from wa_core.records import AssessmentRecord, AverageManifest
    from wa_core.store.base import ObjectStore


class ScriptedAssessor:
    """Finishes at once, with fixed metrics and the average's own buffers; or with what it was told to find.

    With `is_stuck` set, a job goes on until it is cleared, as one that takes long does.
    """

    def __init__(self, assessment: Assessment | None = None) -> None:
        self.num_jobs = 0
        self.is_stuck = False
        self._job: AssessJob | None = None
        self._assessment = assessment or assessment_of(raw=2.0, averaged=1.0)

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do."""
        return self._job is None

    def start(self, job: AssessJob) -> None:
        """Take a job."""
        assert self.is_idle
        assert job.raw_path.exists() == (job.raw_step is not None)
        self.num_jobs += 1
        self._job = job

    def poll(self) -> FinishedJob | None:
        """The scripted outcome, for every average."""
        if self._job is None or self.is_stuck:
            return None
        job, self._job = self._job, None
        assessed = tuple(self._assess(job, manifest) for manifest in job.averages.values())
        return FinishedJob(job.run_id, assessed, job.folder)

    def close(self) -> None:
        """Forget the job."""
        self._job = None

    def _assess(self, job: AssessJob, manifest: AverageManifest) -> Assessed:
        files = {file: job.folder / f"{manifest.name}.{file}" for file in ("model.safetensors", "model.pt")}
        value = open_source(job.value_path(manifest.name))
        served = ServedWeights(value, Buffers({}))
        metadata = provenance(manifest, self._assessment.batchnorm, checkpoints=job.checkpoints)
        served.write_safetensors(files["model.safetensors"], metadata=metadata, on_block=lambda: None)
        served.write_archive(files["model.pt"], on_block=lambda: None)
        value.close()
        return Assessed(manifest, self._assessment, files)


def assessment_of(*, raw: float, averaged: float) -> Assessment:
    """An assessment with these losses."""
    return Assessment(
        raw=Evaluation(step=1, metrics={"loss": raw}),
        averaged=Evaluation(step=1, metrics={"loss": averaged}),
        batchnorm=BatchNormSummary(status="skipped"),
    )


class Crash(BaseException):
    """The process is gone: nothing may catch it, and nothing in memory survives it."""


class WatchedStore:
    """Counts reads by key and, when told to, crashes right after its n-th operation (as SIGKILL would)."""

    def __init__(self, inner: ObjectStore, *, crash_after: int | None = None) -> None:
        self.num_operations = 0
        self.bytes_read: dict[str, int] = {}
        self._inner = inner
        self._crash_after = crash_after

    def stream(self, key: str, start: int = 0, *, end: int | None = None) -> Any:
        """Count what is read of each key."""
        self._count()
        chunks = list(self._inner.stream(key, start=start, end=end))
        self.bytes_read[key] = self.bytes_read.get(key, 0) + sum(map(len, chunks))
        return iter(chunks)

    def list(self, prefix: str, start_after: str = "", *, delimiter: str | None = None) -> Any:
        """List, then count."""
        found = list(self._inner.list(prefix, start_after=start_after, delimiter=delimiter))
        self._count()
        return iter(found)

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._inner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            try:
                return operation(*args, **kwargs)
            finally:
                self._count()

        return counted

    def _count(self) -> None:
        self.num_operations += 1
        if self._crash_after is not None and self.num_operations > self._crash_after:
            raise Crash


def averager(store: ObjectStore, *, assessor: Any = None, memory_bytes: int = 1 << 28, **options: Any) -> Averager:
    """An averager as the process would build it, with time in the test's hands.

    Its working space is removed when it is forgotten; a crash leaves it to the next one, as a kill does.
    """
    scratch = Scratch(memory_bytes=memory_bytes)
    worker = Averager(
        store, clock=ManualClock(), assessor=assessor or ScriptedAssessor(), scratch=scratch, **options
    )
    weakref.finalize(worker, scratch.close)
    return worker


def run_until_idle(worker: Averager, *, max_ticks: int = 500) -> None:
    """Tick until there is nothing to do."""
    for _ in range(max_ticks):
        if not worker.tick():
            return
    raise AssertionError(f"still busy after {max_ticks} ticks")


def newest(run: HandmadeRun, name: str) -> AverageManifest:
    """The newest generation of an average."""
    manifest = Generations(run.store, run.run_id, name).newest()
    assert manifest is not None
    return manifest


def newest_assessment(store: ObjectStore, run_id: str, name: str) -> AssessmentRecord:
    """What the newest generation was found to be; it must have been assessed."""
    generations = Generations(store, run_id, name)
    record = generations.fetch_assessment(generations.numbers()[-1])
    assert record is not None
    return record


def served_weights(store: ObjectStore, run_id: str, name: str) -> dict[str, torch.Tensor]:
    """What a user would download of the newest generation."""
    ref = newest_assessment(store, run_id, name).files["model.safetensors"]
    return read_checkpoint(store.stream(ref.key), size_bytes=ref.size_bytes, sha256=ref.sha256).tensors


def exact_mean(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Brute-force float64 mean of the float tensors of `states`."""
    floats = [name for name, tensor in states[0].items() if tensor.is_floating_point()]
    return {name: torch.stack([state[name].double() for state in states]).mean(0) for name in floats}


def same_bits(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal to the last bit, names, types and shapes included."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )
