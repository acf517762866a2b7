"""What a trainer of one's own does beside training: a heartbeat, and a look at what its owner wants.

A thread writes where training stands and reads what is new in the run log, every two seconds. It knows nothing of
weights. The invariant: training never waits for it; while the store is away, both are a little old.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.catalog.runs import RunLog
from wa_core.errors import WeightAveragingError
from wa_core.records import Heartbeat

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

INTERVAL_S = 2.0


class Pulse:
    """The pulse of one attempt; `close` writes a last beat."""

    def __init__(
        self, store: ObjectStore, run_id: str, *, attempt: int, total_steps: int | None, clock: Clock
    ) -> None:
        self.is_stop_wanted = False
        self._store = store
        self._run_id = run_id
        self._clock = clock
        self._log = RunLog(store, run_id, clock=clock)
        self._beat = Heartbeat(who="trainer", at=clock.now(), attempt=attempt, total_steps=total_steps)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="trainer-pulse", daemon=True)
        self._thread.start()

    def at(self, step: int, *, epoch: int, metrics: Mapping[str, float]) -> None:
        """Say where training stands, in finite numbers; written at the next beat."""
        self._beat = self._beat.model_copy(update={"step": step, "epoch": epoch, "metrics": dict(metrics)})

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join()

    def _work(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._end.wait(INTERVAL_S)
            with suppress(WeightAveragingError):  # advice: the next one says more
                beat = self._beat.model_copy(update={"at": self._clock.now()})
                self._store.put(layout.heartbeat(self._run_id, "trainer"), beat.model_dump_json().encode())
                self._look()

    def _look(self) -> None:
        self._log.refresh()
        self.is_stop_wanted = self._log.desired_state != "succeeded" or self._log.is_past(self._beat.attempt)
