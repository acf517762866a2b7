"""A run that this runner sees through: its log, its driver, and whether the driver must come to an end.

It decides nothing about the run; it only beats, watches and presses. Pressing goes in steps: the driver is left
alone, then asked by SIGINT, then by SIGTERM, then killed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import ValidationError

from services.trainer import telemetry
from services.trainer.admission import lack_of, scaling_of
from services.trainer.child import Child
from services.trainer.failure import NODES_LOST, RUN_DEADLINE, STALLED, Failure
from services.trainer.trace import begin_attempt
from wa_core import layout
from wa_core.errors import ObjectNotFoundError
from wa_core.records import TRAINING, Heartbeat

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from services.runtime.spans import Span
    from wa_core.catalog.runs import RunLog
    from wa_core.records import RunSpec
    from wa_core.store.base import ObjectStore


@dataclass(frozen=True, slots=True)
class Graces:
    """How long a driver may take to end, in seconds.

    `cancel_s` to end at a step boundary, `start_cancel_s` the same before its workers have shown up; then
    `interrupt_s` after SIGINT and `terminate_s` after SIGTERM.
    """

    cancel_s: float = 45.0
    start_cancel_s: float = 5.0
    interrupt_s: float = 15.0
    terminate_s: float = 5.0


@dataclass(slots=True)
class HeldRun:
    """See the module. `end_reason` is why we end the driver, where that is our decision and not its owner's."""

    spec: RunSpec
    log: RunLog
    child: Child
    span: Span
    started_at: float
    beaten_at: float = -1e9
    end_reason: Failure | None = None
    _pressed_since: float | None = None
    _num_signals: int = 0
    _progress: tuple[int | None, float] = field(default=(None, 0.0))

    def __post_init__(self) -> None:
        self._progress = (None, self.started_at)

    @classmethod
    def begin(
        cls, spec: RunSpec, log: RunLog, *, command: Sequence[str], folder: Path | None, now: float
    ) -> HeldRun:
        """Start the driver of the attempt that the log is at."""
        span = begin_attempt(spec, log.attempt)
        child = Child(spec.run_id, log.attempt, command=command, folder=folder, traceparent=span.traceparent)
        return cls(spec, log, child, span, started_at=now)

    @property
    def run_id(self) -> str:
        """The run."""
        return self.spec.run_id

    @property
    def is_taken_away(self) -> bool:
        """Whether the run is somebody else's, or nobody's, by now."""
        return self.log.attempt > self.child.attempt or self.log.state.is_terminal

    @property
    def is_attempt_over(self) -> bool:
        """Whether the driver should come to its end: its owner wants it to, or has what it was for."""
        return self.log.state not in TRAINING or self.log.desired_state != "succeeded"

    def beat(self, store: ObjectStore, *, runner_id: str, at: datetime) -> None:
        """Show that its runner is there."""
        beat = Heartbeat(who="runner", at=at, attempt=self.child.attempt, detail=f"runner {runner_id}")
        store.put(layout.heartbeat(self.run_id, "runner"), beat.model_dump_json().encode())

    def watch(self, store: ObjectStore, *, now: float, totals: Mapping[str, float] | None) -> None:
        """Look whether training gets on.

        An attempt without a step for too long has stalled; one whose workers are not there yet, and fit into the
        cluster's `totals` no more, would wait inside Ray for ever.

        Raises:
            TransientError: the store is away; nothing is concluded.
        """
        beat = self._fetch_beat(store)
        if beat is None and totals is not None and self.end_reason is None:
            scaling = scaling_of(self.spec.request, self.log.entries)
            if lack := lack_of(scaling, totals, where="cluster has lost nodes and now has"):
                self.end_reason = Failure(reason=NODES_LOST, message=lack)
        step = beat.step if beat is not None else None
        if step != self._progress[0]:
            if self._progress[0] is None:
                telemetry.STARTUP_SECONDS.observe(now - self.started_at)
            self._progress = (step, now)
        stall_s = self.spec.request.deadlines.stall_s
        if self.end_reason is None and now - self._progress[1] >= stall_s:
            at = "before its first step" if step is None else f"after step {step}"
            message = f"the attempt stood still {at} for the {stall_s:g} s of its stall_s"
            self.end_reason = Failure(reason=STALLED, message=message)

    def watch_anew(self, *, now: float) -> None:
        """Forget how long training has stood still: nobody could say that it got on."""
        self._progress = (self._progress[0], now)

    def end_for_time(self) -> None:
        """Let the driver end because the run's time is over."""
        self.end_reason = self.end_reason or Failure(reason=RUN_DEADLINE, message="its time was over")

    def press(self, store: ObjectStore, graces: Graces, *, now: float) -> None:
        """Bring the driver to its end; to be called again until it has come."""
        signals = (self.child.interrupt, self.child.terminate, self.child.kill)
        self._pressed_since = now if self._pressed_since is None else self._pressed_since
        if self._num_signals == len(signals):
            return
        grace_s = (self._patience_s(store, graces), graces.interrupt_s, graces.terminate_s)[self._num_signals]
        if now - self._pressed_since >= grace_s:
            signals[self._num_signals]()
            self._num_signals += 1
            self._pressed_since = now

    def _patience_s(self, store: ObjectStore, graces: Graces) -> float:
        """How long the driver is left alone; without workers there are no weights to save."""
        if self.end_reason is not None or self._num_signals:
            return 0.0
        return graces.cancel_s if self._fetch_beat(store) is not None else graces.start_cancel_s

    def _fetch_beat(self, store: ObjectStore) -> Heartbeat | None:
        """The sign of life of this attempt's workers, once there is one."""
        try:
            beat = Heartbeat.model_validate_json(store.get(layout.heartbeat(self.run_id, "trainer")))
        except ObjectNotFoundError:
            return None
        except ValidationError:  # of another version: it shows at least that somebody is there
            return Heartbeat(who="trainer", at=self.spec.created_at, attempt=self.child.attempt)
        return beat if beat.attempt == self.child.attempt else None
