"""A run's metrics as TensorBoard reads them: event files in the bucket, numbered, in a folder for each attempt.

``tensorboard --logdir`` on the folder above shows a run's attempts beside each other. Advisory like all metrics,
and bounded: while the store is away the oldest steps are dropped.
"""

from __future__ import annotations

import math
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from wa_core import layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

MAX_WAITING_STEPS = 100_000


class EventFiles:
    """Takes the metrics of each step, and writes those that wait as one event file."""

    def __init__(self, store: ObjectStore, run_id: str, *, attempt: int, clock: Clock) -> None:
        self._store = store
        self._run_id = run_id
        self._attempt = attempt
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, float, dict[str, float]]] = deque(maxlen=MAX_WAITING_STEPS)
        self._next_part = 1

    def add(self, step: int, *, metrics: Mapping[str, float]) -> None:
        """Record one step; numbers that are not finite are left out."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        with self._lock:
            self._waiting.append((step, self._clock.now().timestamp(), finite))

    def flush(self) -> None:
        """Write what waits as one part; on failure it keeps waiting.

        Raises:
            TransientError: the store is away.
        """
        with self._lock:
            steps = list(self._waiting)
        if not steps:
            return
        key = layout.event_file(self._run_id, attempt=self._attempt, part=self._next_part)
        self._store.put(key, _event_file(steps))
        self._next_part += 1
        with self._lock:
            while self._waiting and self._waiting[0][0] <= steps[-1][0]:
                self._waiting.popleft()


def _event_file(steps: list[tuple[int, float, dict[str, float]]]) -> bytes:
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory(prefix="wa-events-") as folder:
        with SummaryWriter(folder, write_to_disk=True) as writer:
            for step, at, metrics in steps:
                for name, value in metrics.items():
                    writer.add_scalar(name, value, step, walltime=at)
        return b"".join(path.read_bytes() for path in sorted(Path(folder).iterdir()))
