"""Does jobs of one kind when there is nothing to fold: one at a time, in a thread and a child process of its own.

It knows which jobs are wanted, who has taken them, and when it may take one; not how one is done
(`services.averager.idle_job`). The invariant: folding waits for nothing here but one small listing now and then;
and a job whose worker is gone is taken up again, a few times.

Who works on one has created its newest attempt, and keeps `progress.json` changing. As with leases (ADR 13) no
clock is trusted: a worker is alive while that changes, by the reader's own monotonic clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import structlog

from services.averager.idle_job import Taken
from services.averager.lease import Worker
from wa_core.catalog.jobs import list_wanted
from wa_core.errors import ConflictError, NotFoundError, StoreAuthError, TransientError, WeightAveragingError

if TYPE_CHECKING:
    from services.averager.idle_job import IdleJob
    from services.averager.scratch import Scratch
    from wa_core.catalog.jobs import Jobs
    from wa_core.clock import Clock
    from wa_core.records import JobProgress, JobResult
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 2.0
LIFETIME_S = 15.0
MAX_ATTEMPTS = 3


class IdleWorker(ABC):
    """Takes jobs that are wanted, and does them. Not for several threads at once.

    Args:
        store: the bucket.
        clock: the time source.
        scratch: working space.
    """

    jobs: ClassVar[type[Jobs[Any, Any, Any]]]

    def __init__(self, store: ObjectStore, *, clock: Clock, scratch: Scratch) -> None:
        self._store = store
        self._clock = clock
        self._scratch = scratch
        self._worker = Worker()
        self._job: IdleJob | None = None
        self._look_at = clock.monotonic()
        self._seen: dict[str, tuple[JobProgress | None, int, float]] = {}

    @abstractmethod
    def make_job(self, taken: Taken) -> IdleJob:
        """A job, to be started."""

    @property
    def is_busy(self) -> bool:
        """Whether it is at one."""
        return self._job is not None and self._job.is_alive()

    def work(self, *, is_idle: bool) -> None:
        """Take a job, if one is wanted, none is under way here, and there is nothing better to do.

        Raises:
            TransientError: the store is away.
        """
        now = self._clock.monotonic()
        if self.is_busy or not is_idle or now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S
        try:
            wanted = list(list_wanted(self._store, self.jobs.kind))
            for gone in self._seen.keys() - {job_id for _, _, job_id in wanted}:
                del self._seen[gone]
            self._job = next((job for place in wanted if (job := self._taken(*place))), None)
        except StoreAuthError as error:  # whoever may fold may not be allowed to do this; folding goes on
            log.warning("jobs_refused", kind=self.jobs.kind, error=error.message)
            self._look_at = now + 30 * LOOK_EVERY_S
            return  # the job that is known is over
        if self._job is not None:
            self._job.start()

    def close(self) -> None:
        """Give up what is under way; another averager takes it up at once."""
        if self._job is not None:
            self._job.stop()

    def _taken(self, run_id: str, name: str, job_id: str) -> IdleJob | None:
        try:
            return self._take(self.jobs(self._store, run_id, name), job_id)
        except (ConflictError, NotFoundError):
            return None  # another averager was quicker; or the request has not got further than its marker
        except (TransientError, StoreAuthError):
            raise
        except WeightAveragingError as error:
            log.warning("job_unreadable", kind=self.jobs.kind, run_id=run_id, job_id=job_id, error=error.message)
            return None

    def _take(self, known: Jobs[Any, Any, Any], job_id: str) -> IdleJob | None:
        found = known.fetch(job_id)
        if found.result is not None:
            known.unmark(job_id)  # whoever finished it was ended in between
            return None
        newest = known.newest_attempt(job_id)
        if newest and self._is_alive(job_id, found.progress, newest):
            return None
        if newest >= MAX_ATTEMPTS:
            known.finish(self._abandoned(known, job_id, newest))
            return None
        attempt = known.begin(job_id, attempt=newest + 1, at=self._clock.now(), who=self._worker.name)
        log.info("job_taken", kind=known.kind, run_id=known.run_id, job_id=job_id, attempt=attempt.attempt)
        folder = self._scratch.new_folder(f"{known.noun}-")
        return self.make_job(Taken(known, found.record, attempt, folder, is_last=attempt.attempt == MAX_ATTEMPTS))

    def _is_alive(self, job_id: str, progress: JobProgress | None, attempt: int) -> bool:
        """Whether whoever has taken it may still be at it."""
        now = self._clock.monotonic()
        if progress is not None and progress.attempt == attempt:
            is_released = progress.who in ("", self._worker.name)
            if is_released or self._worker.knows_to_be_dead(progress.who):
                return False
        seen, at, since = self._seen.get(job_id, (None, 0, now))
        if at != attempt or seen != progress:
            self._seen[job_id] = (progress, attempt, now)
            return True
        return now - since < LIFETIME_S

    def _abandoned(self, known: Jobs[Any, Any, Any], job_id: str, attempts: int) -> JobResult:
        result: JobResult = known.outcome(
            job_id,
            at=self._clock.now(),
            state="failed",
            code=f"{known.noun}_abandoned",
            message=f"{attempts} attempts ended without a result, the last one without a sign of life; ask again",
        )
        return result
