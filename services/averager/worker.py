"""The averaging worker: one tick takes one step for every active run, so no run starves another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from services.averager.follower import RunFollower
from wa_core.catalog.runs import list_active
from wa_core.errors import RunNotFoundError, TransientError

if TYPE_CHECKING:
    from services.averager.assessor import Assessor
    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

TROUBLE_PAUSE_S = 10.0


class Averager:
    """Follows every active run of one bucket."""

    def __init__(self, store: ObjectStore, *, clock: Clock, assessor: Assessor) -> None:
        self._store = store
        self._clock = clock
        self._assessor = assessor
        self._followers: dict[str, RunFollower] = {}
        self._paused_until: dict[str, float] = {}
        self._last_stepped = ""

    def tick(self) -> bool:
        """Take one step for each active run; returns whether any had something to do.

        Raises:
            TransientError: the store is away.
        """
        active = set(list_active(self._store))
        for gone in self._followers.keys() - active:
            del self._followers[gone]
        # On from the run that was last: one whose objects cannot be read, and so ends the tick, stops no other.
        in_turn = sorted(active, key=lambda run_id: (run_id <= self._last_stepped, run_id))
        did = [self._step(run_id) for run_id in in_turn]
        return any(did)

    def _step(self, run_id: str) -> bool:
        if self._clock.monotonic() < self._paused_until.get(run_id, 0.0):
            return False
        self._last_stepped = run_id
        try:
            return self._follower(run_id).step()
        except TransientError:
            raise
        except RunNotFoundError:
            return False  # a marker whose submission has not got further, or never will
        except Exception:  # the outermost place that knows the run: one broken run must not stop the others
            log.exception("run_in_trouble", run_id=run_id, retry_in_s=TROUBLE_PAUSE_S)
            self._followers.pop(run_id, None)
            self._paused_until[run_id] = self._clock.monotonic() + TROUBLE_PAUSE_S
            return False

    def _follower(self, run_id: str) -> RunFollower:
        if run_id not in self._followers:
            follower = RunFollower(self._store, run_id, clock=self._clock, assessor=self._assessor)
            self._followers[run_id] = follower
        return self._followers[run_id]
