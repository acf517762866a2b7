"""Which runners are gone: they said so, their process has ended, or their heartbeat stood still as we watched.

What a heartbeat says is only compared with what it said before, so clocks that disagree do no harm; and what could
not be read proves nothing: unknown is never gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.trainer.failure import RUNNER_STOPPED
from services.trainer.identity import is_provably_gone
from wa_core import layout
from wa_core.errors import ObjectNotFoundError
from wa_core.records import AttemptFailed, AttemptStarted, AverageAdded

if TYPE_CHECKING:
    from collections.abc import Container

    from wa_core.catalog.runs import RunLog
    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore


class LostRunners:
    """Watches the heartbeats of other runners, by run.

    Args:
        store: the bucket.
        runner_id: our own.
        lost_after_s: how long a heartbeat may stand still.
        clock: the time.
    """

    def __init__(self, store: ObjectStore, *, runner_id: str, lost_after_s: float, clock: Clock) -> None:
        self._store = store
        self._runner_id = runner_id
        self._lost_after_s = lost_after_s
        self._clock = clock
        self._seen: dict[str, tuple[bytes | None, float]] = {}

    def has_lost(self, log: RunLog) -> bool:
        """Whether the runner of a run's newest attempt is gone. A run without attempts has lost nobody.

        Raises:
            TransientError: the store is away.
        """
        starts = [entry for entry in log.entries if isinstance(entry, AttemptStarted)]
        return bool(starts) and self._is_gone(log, starts[-1].runner_id)

    def watch_anew(self) -> None:
        """Forget how long heartbeats stood still: nobody could write them meanwhile."""
        self._seen.clear()

    def keep(self, run_ids: Container[str]) -> None:
        """Forget runs that are not among these."""
        self._seen = {run_id: seen for run_id, seen in self._seen.items() if run_id in run_ids}

    def _is_gone(self, log: RunLog, runner_id: str) -> bool:
        last = next(entry for entry in reversed(log.entries) if not isinstance(entry, AverageAdded))
        if isinstance(last, AttemptFailed) and last.reason == RUNNER_STOPPED:
            return True
        if runner_id == self._runner_id or is_provably_gone(runner_id):
            return True
        now, beat = self._clock.monotonic(), self._fetch_beat(log.run_id)
        seen, since = self._seen.get(log.run_id, (None, now))
        if log.run_id not in self._seen or seen != beat:
            self._seen[log.run_id] = (beat, now)
            return False
        return now - since >= self._lost_after_s

    def _fetch_beat(self, run_id: str) -> bytes | None:
        try:
            return self._store.get(layout.heartbeat(run_id, "runner"))
        except ObjectNotFoundError:
            return None
