"""Runs that wait for a place: what the API is told of them, and their end once they have waited too long.

It decides nothing about who starts; that is the runner's, by `services.trainer.admission`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from services.trainer import telemetry
from services.trainer.budget import waited_s
from services.trainer.failure import INSUFFICIENT_RESOURCES, QUEUE_DEADLINE
from wa_core import layout
from wa_core.records import WAITING, Failed, Heartbeat, Marker, RunState

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

    from services.trainer.admission import Wait
    from wa_core.catalog.runs import RunLog
    from wa_core.clock import Clock
    from wa_core.records import RunSpec
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)


class WaitingRuns:
    """See the module. It remembers what it said, so that nothing is said twice."""

    def __init__(self, store: ObjectStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._said: dict[str, tuple[int, Wait | None]] = {}

    def say(self, run_log: RunLog, wait: Wait | None) -> None:
        """Let the API know what a run waits for, None for nothing any more, whenever that changes."""
        said = (run_log.attempt, wait)
        if self._said.get(run_log.run_id, (run_log.attempt, None)) == said:
            return
        note = Heartbeat(
            who=WAITING,
            at=self._clock.now(),
            attempt=run_log.attempt,
            reason=wait.reason if wait else "",
            detail=wait.message if wait else "",
        )
        self._store.put(layout.heartbeat(run_log.run_id, WAITING), note.model_dump_json().encode())
        self._said[run_log.run_id] = said

    def put_back(self, spec: RunSpec) -> None:
        """Write the marker of a queued run again; whoever let it wait again may have died before."""
        marker = Marker(run_id=spec.run_id, at=self._clock.now()).model_dump_json().encode()
        self._store.put(layout.queue_marker(spec.run_id, priority=spec.request.priority), marker)

    def has_expired(self, spec: RunSpec, run_log: RunLog) -> bool:
        """Whether a queued run has waited longer than its submission allows."""
        allowed_s = spec.request.deadlines.queue_s
        return allowed_s is not None and waited_s(run_log.entries, now=self._clock.now()) > allowed_s

    def expire(self, spec: RunSpec, run_log: RunLog, wait: Wait | None) -> None:
        """End a run that has waited too long, and say for what it waited."""
        is_hopeless = wait is not None and wait.reason == INSUFFICIENT_RESOURCES
        waited = f"it waited longer than the {spec.request.deadlines.queue_s:g} s of its queue_s"
        reason = INSUFFICIENT_RESOURCES if is_hopeless else QUEUE_DEADLINE
        message = f"{waited}: {wait.message}" if wait is not None else f"{waited} for a place"
        run_log.append(Failed(reason=reason, message=message), expect={RunState.QUEUED})
        telemetry.RUNS_FAILED.labels(telemetry.known(reason)).inc()
        log.error("run_expired", run_id=spec.run_id, reason=reason, message=message)

    def forget_others(self, active: AbstractSet[str]) -> None:
        """Keep only what was said of active runs."""
        self._said = {run_id: said for run_id, said in self._said.items() if run_id in active}
