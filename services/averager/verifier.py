"""Verifies averages when there is nothing to fold (ADR 44)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.averager.idle_worker import IdleWorker
from services.averager.verification_job import COMMAND, VerificationJob
from wa_core.catalog.verifications import Verifications

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.averager.idle_job import Taken
    from services.averager.scratch import Scratch
    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore


class Verifier(IdleWorker):
    """Takes verifications that are wanted, and does them.

    Args:
        store: the bucket.
        clock: the time source.
        scratch: working space.
        environment: by which the process that verifies finds the same bucket.
        command: what that process is; run, average and generation follow.
    """

    jobs = Verifications

    def __init__(
        self,
        store: ObjectStore,
        *,
        clock: Clock,
        scratch: Scratch,
        environment: Mapping[str, str],
        command: Sequence[str] = COMMAND,
    ) -> None:
        super().__init__(store, clock=clock, scratch=scratch)
        self._environment = environment
        self._command = command

    def make_job(self, taken: Taken) -> VerificationJob:
        """A verification, to be started."""
        return VerificationJob(taken, clock=self._clock, environment=self._environment, command=self._command)
