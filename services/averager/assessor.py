"""The averager's side of assessing: keeps one child process, gives it jobs, and survives what it does.

A job is started and asked after; nothing here waits, and nothing the child does raises. The child starts with the
first job (importing torch and a recipe costs seconds) and serves many. It is killed, and a new one serves the next
job, when it dies, takes too long or too much memory, or talks nonsense; the outcome then says so, and the average
is served with the BatchNorm statistics it came with. Where there is a cluster, a child that measures on it comes
first; whatever goes wrong with it, the job is done by a process here all the same (ADR 30).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol, Self

import structlog

from services.averager.assessed_files import AssessedFiles
from services.averager.child import COMMAND, AssessChild, ray_environment
from services.averager.hearing import Hearing
from wa_core.clock import SystemClock
from wa_core.errors import UserCodeError
from wa_core.records import NO_RECIPE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.averager.assess_job import AssessJob, FinishedJob
    from services.averager.hearing import Where
    from wa_core.clock import Clock

log = structlog.get_logger(__name__)

TIME_LIMIT_S = 300.0
MEMORY_LIMIT_BYTES = 4 << 30
RAY_AGAIN_AFTER_S = 60.0
_NO_RECIPE_MESSAGE = (
    "the run has no recipe, so nothing was recalibrated or measured: BatchNorm statistics are those pooled over "
    "the checkpoints; call recalibrate() after downloading, or register the run with a recipe"
)


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
        self._writing: AssessedFiles | None = None

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
            self._writing = AssessedFiles(self._hearing, took_s=took_s)
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
            job.write()
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
