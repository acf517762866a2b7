"""Keeps the bucket as small as each run's policy allows: sweeps one run at a time, now and then, in between.

It knows when to sweep what; what may go is `wa_core.catalog.retention`'s to say. The invariant: trouble with a
sweep is logged and costs nothing but a later one; folding never waits for more than one bounded sweep.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import structlog

from wa_core.catalog.runs import list_run_ids
from wa_core.catalog.sweeper import Sweeper
from wa_core.errors import StoreAuthError, TransientError, WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Collection

    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

SWEEP_EVERY_S = 60.0
# Of one sweep: what is left is for the next one.
_DEPTH = 200
_MAX_DELETES = 200


class Janitor:
    """Sweeps the runs of one averager in turn, and those that have ended until nothing is left to do for them.

    Args:
        store: the bucket.
        clock: the time source.
    """

    def __init__(self, store: ObjectStore, *, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._due_at = clock.monotonic() + SWEEP_EVERY_S
        self._sweepers: dict[str, Sweeper] = {}
        self._queue: deque[str] = deque()
        self._settled: set[str] = set()

    def sweep_if_due(self, *, held: Collection[str], active: Collection[str]) -> None:
        """Sweep the next run, when it is time.

        Args:
            held: the runs that this averager works on.
            active: all runs that are not wholly done; those held by others are theirs to sweep.

        Raises:
            TransientError: the store is away.
            StoreAuthError: the store refuses the credentials.
        """
        if self._clock.monotonic() < self._due_at:
            return
        self._due_at = self._clock.monotonic() + SWEEP_EVERY_S
        if not self._queue:
            self._fill(held, active)
        if self._queue:
            self._sweep(self._queue.popleft())

    def _fill(self, held: Collection[str], active: Collection[str]) -> None:
        """A new round: every run that is held, and every ended one that is not known to be tidy."""
        self._settled -= set(active)  # an average was added to it
        ended = [run_id for run_id in list_run_ids(self._store) if run_id not in active]
        self._queue.extend([*held, *(run_id for run_id in ended if run_id not in self._settled)])
        for gone in self._sweepers.keys() - {*held, *self._queue}:
            del self._sweepers[gone]

    def _sweep(self, run_id: str) -> None:
        try:
            if run_id not in self._sweepers:
                self._sweepers[run_id] = Sweeper(
                    self._store, run_id, clock=self._clock, depth=_DEPTH, max_deletes=_MAX_DELETES
                )
            sweeper = self._sweepers[run_id]
            report = sweeper.sweep()
        except (TransientError, StoreAuthError):
            raise
        except WeightAveragingError as error:
            log.warning("sweep_failed", run_id=run_id, code=error.code, error=error.message)
            return
        if report.deleted:
            log.info("swept", run_id=run_id, deleted=len(report.deleted), freed_bytes=report.freed_bytes)
        if sweeper.is_over and report.is_settled:
            self._settled.add(run_id)
            del self._sweepers[run_id]
