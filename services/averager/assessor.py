"""The averager's side of assessing: keeps one child process, gives it jobs, and survives what it does.

A job is started and asked after; nothing here waits, and nothing the child does raises. The child starts with the
first job (importing torch and a recipe costs seconds) and serves many. It is killed, and a new one serves the next
job, when it dies, takes too long or too much memory, or talks nonsense; the outcome then says so, and the average
is served with the BatchNorm statistics it came with. Where there is a cluster, a child that measures on it comes
first; whatever goes wrong with it, the job is done by a process here all the same (ADR 30).
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

import structlog

from services.averager.child import COMMAND, AssessChild, ray_environment
from services.averager.hearing import Hearing
from services.averager.protocol import AverageFound, JobFile, buffers_path, job_path, raw_path, value_path
from services.averager.publication import Buffers, ServedWeights, provenance
from wa_core import layout
from wa_core.averaging.files.sources import open_source
from wa_core.clock import SystemClock
from wa_core.errors import UserCodeError, WeightAveragingError
from wa_core.records import NO_RECIPE, Assessment, BatchNormSummary, Evaluation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from services.averager.hearing import Where
    from wa_core.clock import Clock
    from wa_core.records import AverageManifest, RunRequest

log = structlog.get_logger(__name__)

TIME_LIMIT_S = 300.0
MEMORY_LIMIT_BYTES = 4 << 30
RAY_AGAIN_AFTER_S = 60.0
_NO_RECIPE_MESSAGE = (
    "the run has no recipe, so nothing was recalibrated or measured: BatchNorm statistics are those pooled over "
    "the checkpoints; call recalibrate() after downloading, or register the run with a recipe"
)


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


class Assessor(Protocol):
    """Recalibrates and measures averages, one job at a time, beside whatever else its owner does."""

    @property
    def is_idle(self) -> bool:
        """Whether a job can be started."""
        ...

    def start(self, job: AssessJob) -> None:
        """Begin a job; returns at once. Only when idle."""
        ...

    def poll(self) -> FinishedJob | None:
        """The job's outcome, once; None while there is none. Never waits; trouble is an outcome."""
        ...

    def close(self) -> None:
        """Give up the job, if there is one, and let go of everything but its folder."""
        ...


class ProcessAssessor:
    """Assesses in a child process. A context manager: leaving it ends the child.

    Args:
        time_limit_s: after so long a job's child is killed.
        memory_limit_bytes: when its child is seen to hold more (`Child.memory_bytes`), it is killed; None, and
            where the system does not tell: no limit.
        clock: what the time limit goes by.
        command: what the child is.
        on_ray: the child that measures on a cluster, tried first; None without one.
    """

    def __init__(
        self,
        *,
        time_limit_s: float = TIME_LIMIT_S,
        memory_limit_bytes: int | None = MEMORY_LIMIT_BYTES,
        clock: Clock | None = None,
        command: Sequence[str] = COMMAND,
        on_ray: Sequence[str] | None = None,
    ) -> None:
        self._time_limit_s = time_limit_s
        self._memory_limit_bytes = memory_limit_bytes
        self._clock = clock or SystemClock()
        self._commands: dict[Where, Sequence[str] | None] = {"process": command, "ray": on_ray}
        self._child: AssessChild | None = None
        self._serves: tuple[Where, str | None] = ("process", None)
        self._ray_again_at = -math.inf
        self._hearing: Hearing | None = None
        self._writing: _Writing | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_idle(self) -> bool:
        """Whether a job can be started."""
        return self._hearing is None and self._writing is None

    def start(self, job: AssessJob) -> None:
        """Begin a job."""
        assert self.is_idle, "one job at a time"  # noqa: S101  programmer's error
        now = self._clock.monotonic()
        is_on_ray = self._commands["ray"] is not None and now >= self._ray_again_at
        hearing = self._hearing = Hearing(job, started_at=now, where="ray" if is_on_ray else "process")
        if job.request.recipe == NO_RECIPE:
            hearing.where = "process"
            hearing.fail("no_recipe", _NO_RECIPE_MESSAGE)
            return
        self._ask(hearing)

    def poll(self) -> FinishedJob | None:
        """The job's outcome, once."""
        if self._hearing is not None and self._hear(self._hearing):
            took_s = self._clock.monotonic() - self._hearing.started_at
            self._writing = _Writing(self._hearing, took_s=took_s)
            self._hearing = None
        if self._writing is None or self._writing.outcome is None:
            return None
        finished, self._writing = self._writing.outcome, None
        return finished

    def close(self) -> None:
        """End the child and give up the job."""
        self._end_child()
        if self._writing is not None:
            self._writing.stop()
        self._hearing = self._writing = None

    def _ask(self, hearing: Hearing) -> None:
        """Give the child its job, which may need a new child."""
        job, serves = hearing.job, (hearing.where, hearing.job.request.package)
        try:
            _write_job(job)
            # What one package has imported must not stand in for another's modules, nor see another's weights.
            if self._child is None or not self._child.is_ready or self._serves != serves:
                self._end_child()
                self._child, self._serves = self._new_child(hearing.where), serves
            self._child.ask_job(job.folder)
        except OSError as error:
            self._give_up("assess_failed", f"the assess process could not be asked ({error})")

    def _new_child(self, where: Where) -> AssessChild:
        command = self._commands[where]
        assert command is not None  # noqa: S101  nobody asks on a cluster that is not there
        # The child on the cluster runs no user code; it needs to say the cluster's token.
        return AssessChild(command, environment=ray_environment() if where == "ray" else {})

    def _hear(self, hearing: Hearing) -> bool:
        """Take in what the child has said; whether that, or its end, was the last of the job."""
        if not hearing.is_over and self._child is not None:
            try:
                hearing.take(self._child.lines())
            except UserCodeError as error:
                self._give_up("assess_failed", error.message)
            else:
                self._check_limits(hearing)
        if hearing.has_failed and hearing.where == "ray":
            self._do_it_here(hearing)
            return False
        return hearing.is_over or self._child is None

    def _do_it_here(self, hearing: Hearing) -> None:
        """Start a job anew that came to nothing on the cluster, and leave the cluster alone for a while."""
        log.warning("assess_left_the_cluster", run_id=hearing.job.run_id, reason=hearing.failure.message)
        self._end_child()
        now = self._clock.monotonic()
        self._ray_again_at = now + RAY_AGAIN_AFTER_S
        self._hearing = Hearing(hearing.job, started_at=now)
        self._ask(self._hearing)

    def _check_limits(self, hearing: Hearing) -> None:
        if hearing.is_over or self._child is None:
            return
        held, limit = self._child.memory_bytes, self._memory_limit_bytes
        if limit is not None and held is not None and held > limit:
            self._give_up(
                "assess_out_of_memory",
                f"assessing held {held >> 20} MiB, over the limit of {limit >> 20} MiB, and was killed; let the "
                f"recipe yield smaller batches, or raise WA_ASSESS_MEMORY_MB",
            )
        elif self._clock.monotonic() - hearing.started_at > self._time_limit_s:
            self._give_up(
                "assess_timeout",
                f"assessing took longer than {self._time_limit_s:g} s and was killed; let the recipe hold out "
                f"less data, or raise WA_ASSESS_TIME_LIMIT_S",
            )

    def _give_up(self, code: str, message: str) -> None:
        self._end_child()
        if self._hearing is not None:
            self._hearing.fail(code, message)

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None


class _Stopped(Exception):  # noqa: N818  no error: somebody wants the end
    """Writing was given up."""


class _Writing:
    """Writes the files to serve, in a thread: large models take long, and the averager has other things to do."""

    def __init__(self, hearing: Hearing, *, took_s: float) -> None:
        self.outcome: FinishedJob | None = None
        self._hearing = hearing
        self._took_s = took_s
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="assessed-files", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give up, within a block of bytes."""
        self._is_stopping.set()
        self._thread.join()

    def _run(self) -> None:
        job = self._hearing.job
        assessed = []
        for name, manifest in job.averages.items():
            try:
                assessed.append(self._write(manifest, self._hearing.of(name)))
            except _Stopped:
                return
            except (WeightAveragingError, OSError) as error:
                log.warning("assessed_files_not_written", run_id=job.run_id, average=name, error=str(error))
            except Exception:  # the thread's outermost loop: without an outcome nothing would be assessed again
                log.exception("assessed_files_not_written", run_id=job.run_id, average=name)
        self.outcome = FinishedJob(job.run_id, tuple(assessed), job.folder)

    def _write(self, manifest: AverageManifest, found: AverageFound) -> Assessed:
        job, name = self._hearing.job, manifest.name
        value = open_source(job.value_path(name))
        try:
            buffers = Buffers.read(buffers_path(job.folder, name), value) if found.has_buffers else Buffers({})
            if isinstance(buffers, str):
                refused = BatchNormSummary(status="failed", code="assess_failed", message=buffers)
                found, buffers = AverageFound(name=name, before=found.before, batchnorm=refused), Buffers({})
            files = {file: job.folder / f"{name}.{file}" for file in (layout.MODEL_FILE, layout.PICKLE_FILE)}
            served = ServedWeights(value, buffers)
            metadata = provenance(manifest, found.batchnorm, checkpoints=job.checkpoints)
            served.write_safetensors(files[layout.MODEL_FILE], metadata=metadata, on_block=self._go_on)
            served.write_archive(files[layout.PICKLE_FILE], on_block=self._go_on)
        finally:
            value.close()
        job.value_path(name).unlink()  # scratch space is as scarce as models are large
        return Assessed(manifest, self._assessment(manifest, found), files)

    def _assessment(self, manifest: AverageManifest, found: AverageFound) -> Assessment:
        raw, raw_step, step = self._hearing.raw, self._hearing.job.raw_step, manifest.last_step or 0
        return Assessment(
            raw=_evaluation(raw_step, raw.metrics if raw else None),
            averaged=_evaluation(step, found.after),
            before_recalibration=_evaluation(step, found.before),
            batchnorm=found.batchnorm,
            comparison=found.comparison,
            data_sha256=raw.data_sha256 if raw else None,
            layers=found.layers,
            took_s=self._took_s,
            where=self._hearing.where,
        )

    def _go_on(self) -> None:
        if self._is_stopping.is_set():
            raise _Stopped


def _write_job(job: AssessJob) -> None:
    about = JobFile(
        recipe=job.request.recipe,
        code=str(job.code) if job.code else None,
        config=job.request.config,
        seed=job.request.seed,
        has_raw=job.raw_step is not None,
        averages=list(job.averages),
    )
    job_path(job.folder).write_text(about.model_dump_json())


def _evaluation(step: int | None, metrics: Mapping[str, float] | None) -> Evaluation | None:
    return None if step is None or metrics is None else Evaluation(step=step, metrics=dict(metrics))
