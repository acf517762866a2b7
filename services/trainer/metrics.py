"""Step metrics and the trainer's heartbeat, written to the bucket in batches and never through Ray.

Both are advisory: losing a batch loses a few points of a curve. Memory is bounded: while the store is away the
oldest lines are dropped.
"""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.records import Heartbeat

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

MAX_WAITING_LINES = 100_000


class MetricsWriter:
    """Takes one line per step and writes them as numbered JSON-lines parts, with a heartbeat beside them."""

    def __init__(self, store: ObjectStore, run_id: str, *, attempt: int, total_steps: int, clock: Clock) -> None:
        self._store = store
        self._run_id = run_id
        self._attempt = attempt
        self._total_steps = total_steps
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: deque[str] = deque(maxlen=MAX_WAITING_LINES)
        self._next_part = 1
        self._newest: tuple[int, int, dict[str, float]] = (0, 0, {})
        self._began: tuple[int, float] = (0, clock.monotonic())

    def at(self, step: int, *, epoch: int) -> None:
        """Say where training stands, without a metric: what the heartbeat shows before the first step."""
        with self._lock:
            self._newest = (step, epoch, {})
            self._began = (step, self._clock.monotonic())

    def add(self, step: int, *, epoch: int, metrics: Mapping[str, float]) -> None:
        """Record one step; numbers that are not finite become null in the file and are left out elsewhere."""
        line = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        text = json.dumps({"step": step, "epoch": epoch, **line, "at": self._clock.now().isoformat()})
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        with self._lock:
            self._waiting.append(text)
            # What is measured now and then stays in sight until it is measured again.
            kept = {name: value for name, value in self._newest[2].items() if name not in metrics}
            self._newest = (step, epoch, kept | finite)

    def flush(self) -> None:
        """Write what waits as one part; on failure it keeps waiting.

        Raises:
            TransientError: the store is away.
        """
        with self._lock:
            lines = list(self._waiting)
        if not lines:
            return
        key = layout.metrics_part(self._run_id, attempt=self._attempt, part=self._next_part)
        self._store.put(key, "".join(f"{line}\n" for line in lines).encode())
        self._next_part += 1
        with self._lock:
            for line in lines:
                if self._waiting and self._waiting[0] == line:
                    self._waiting.popleft()

    def beat(self) -> None:
        """Write the heartbeat.

        Raises:
            TransientError: the store is away.
        """
        with self._lock:
            step, epoch, metrics = self._newest
        heartbeat = Heartbeat(
            who="trainer",
            at=self._clock.now(),
            attempt=self._attempt,
            step=step,
            total_steps=self._total_steps,
            steps_per_s=self._pace(step),
            epoch=epoch,
            metrics=metrics,
        )
        self._store.put(layout.heartbeat(self._run_id, "trainer"), heartbeat.model_dump_json().encode())

    def _pace(self, step: int) -> float | None:
        """Steps per second over the attempt, checkpoints and evaluations included; None before the first one."""
        first, began = self._began
        seconds = self._clock.monotonic() - began
        return (step - first) / seconds if step > first and seconds > 0 else None
