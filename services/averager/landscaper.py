"""Works landscapes out when there is nothing to fold (ADR 26)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.averager.idle_worker import IdleWorker
from services.averager.landscape_job import COMMAND, LandscapeJob, Limits
from wa_core.catalog.landscapes import Landscapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.averager.idle_job import Taken
    from services.averager.scratch import Scratch
    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore


class Landscaper(IdleWorker):
    """Takes landscapes that are wanted, and works them out.

    Args:
        store: the bucket.
        clock: the time source.
        scratch: working space.
        limits: of each landscape.
        command: what the landscape process is.
    """

    jobs = Landscapes

    def __init__(
        self,
        store: ObjectStore,
        *,
        clock: Clock,
        scratch: Scratch,
        limits: Limits | None = None,
        command: Sequence[str] = COMMAND,
    ) -> None:
        super().__init__(store, clock=clock, scratch=scratch)
        self._limits = limits or Limits()
        self._command = command

    def make_job(self, taken: Taken) -> LandscapeJob:
        """A landscape, to be started."""
        return LandscapeJob(self._store, taken, clock=self._clock, limits=self._limits, command=self._command)
