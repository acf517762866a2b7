"""Works landscapes out when there is nothing to fold: one at a time, in a thread and a child process of its own.

It knows which landscapes are wanted, who has taken them, and when it may take one; not how a landscape is made
(`services.averager.landscape_job`). The invariant: folding waits for nothing here but one small listing now and
then; and a landscape whose worker is gone is taken up again, a few times.

Who works on one has created its newest attempt, and keeps `progress.json` changing. As with leases (ADR 13) no
clock is trusted: a worker is alive while that changes, by the reader's own monotonic clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from services.averager.landscape_job import COMMAND, LandscapeJob, Limits
from services.averager.lease import Worker
from wa_core.catalog.landscapes import Landscapes, list_wanted
from wa_core.errors import ConflictError, NotFoundError, StoreAuthError, TransientError, WeightAveragingError
from wa_core.records import LandscapeAttempt, LandscapeResult

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.averager.scratch import Scratch
    from wa_core.clock import Clock
    from wa_core.records import LandscapeProgress
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

LOOK_EVERY_S = 2.0
LIFETIME_S = 15.0
MAX_ATTEMPTS = 3
ABANDONED = "landscape_abandoned"


class Landscaper:
    """Takes landscapes that are wanted, and works them out. Not for several threads at once.

    Args:
        store: the bucket.
        clock: the time source.
        scratch: working space.
        limits: of each landscape.
        command: what the landscape process is.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        clock: Clock,
        scratch: Scratch,
        limits: Limits | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._store = store
        self._clock = clock
        self._scratch = scratch
        self._limits = limits or Limits()
        self._command = command
        self._worker = Worker()
        self._job: LandscapeJob | None = None
        self._look_at = clock.monotonic()
        self._seen: dict[str, tuple[LandscapeProgress | None, int, float]] = {}

    @property
    def is_busy(self) -> bool:
        """Whether it is at one."""
        return self._job is not None and self._job.is_alive()

    def work(self, *, is_idle: bool) -> None:
        """Take a landscape, if one is wanted, none is under way here, and there is nothing better to do.

        Raises:
            TransientError: the store is away.
        """
        now = self._clock.monotonic()
        if self.is_busy or not is_idle or now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S
        try:
            wanted = list(list_wanted(self._store))
            for gone in self._seen.keys() - {landscape_id for _, _, landscape_id in wanted}:
                del self._seen[gone]
            self._job = next((job for place in wanted if (job := self._taken(*place))), None)
        except StoreAuthError as error:  # whoever may fold may not be allowed to do this; folding goes on
            log.warning("landscapes_refused", error=error.message)
            self._look_at = now + 30 * LOOK_EVERY_S
        if self._job is not None:
            self._job.start()

    def close(self) -> None:
        """Give up what is under way; another averager takes it up at once."""
        if self._job is not None:
            self._job.stop()

    def _taken(self, run_id: str, name: str, landscape_id: str) -> LandscapeJob | None:
        try:
            return self._take(Landscapes(self._store, run_id, name), landscape_id)
        except (ConflictError, NotFoundError):
            return None  # another averager was quicker; or the request has not got further than its marker
        except (TransientError, StoreAuthError):
            raise
        except WeightAveragingError as error:
            log.warning("landscape_unreadable", run_id=run_id, landscape_id=landscape_id, error=error.message)
            return None

    def _take(self, known: Landscapes, landscape_id: str) -> LandscapeJob | None:
        found = known.fetch(landscape_id)
        if found.result is not None:
            known.unmark(landscape_id)  # whoever finished it was ended in between
            return None
        newest = known.newest_attempt(landscape_id)
        if newest and self._is_alive(landscape_id, found.progress, newest):
            return None
        if newest >= MAX_ATTEMPTS:
            known.finish(self._abandoned(landscape_id, newest))
            return None
        attempt = LandscapeAttempt(
            landscape_id=landscape_id, attempt=newest + 1, at=self._clock.now(), who=self._worker.name
        )
        known.take(attempt)
        log.info("landscape_taken", run_id=known.run_id, landscape_id=landscape_id, attempt=attempt.attempt)
        return LandscapeJob(
            self._store,
            found.record,
            attempt,
            clock=self._clock,
            folder=self._scratch.new_folder("landscape-"),
            limits=self._limits,
            command=self._command,
            is_last=attempt.attempt == MAX_ATTEMPTS,
        )

    def _is_alive(self, landscape_id: str, progress: LandscapeProgress | None, attempt: int) -> bool:
        """Whether whoever has taken it may still be at it."""
        now = self._clock.monotonic()
        if progress is not None and progress.attempt == attempt:
            is_released = progress.who in ("", self._worker.name)
            if is_released or self._worker.knows_to_be_dead(progress.who):
                return False
        seen, at, since = self._seen.get(landscape_id, (None, 0, now))
        if at != attempt or seen != progress:
            self._seen[landscape_id] = (progress, attempt, now)
            return True
        return now - since < LIFETIME_S

    def _abandoned(self, landscape_id: str, attempts: int) -> LandscapeResult:
        return LandscapeResult(
            landscape_id=landscape_id,
            at=self._clock.now(),
            state="failed",
            code=ABANDONED,
            message=f"{attempts} attempts ended without a result, the last one without a sign of life; ask again",
        )
