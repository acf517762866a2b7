"""The simulated trainer and runner: says what the script says, in the real run log, and leaves zombies behind."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from support.simulation.script import STEP, checkpoint_body
from wa_core import layout
from wa_core.catalog.runs import RunLog
from wa_core.errors import ConflictError, TransientError
from wa_core.records import (
    AttemptFailed,
    AttemptStarted,
    Cancelled,
    CheckpointCommitted,
    FileRef,
    LogEntry,
    TrainingFinished,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.simulation.schedule import Actor
    from support.simulation.script import Attempt, Script
    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

T = TypeVar("T")


class Trainer:
    """Trains the run of a script, attempt by attempt.

    Args:
        run_id: the run, just submitted.
        script: what happens.
        clock: stamps the entries.
        open_store: gives an actor its way to the bucket.
        start: lets another actor take part.
    """

    def __init__(
        self,
        run_id: str,
        script: Script,
        *,
        clock: Clock,
        open_store: Callable[[Actor], ObjectStore],
        start: Callable[[str, Callable[[Actor], None]], object],
    ) -> None:
        self._run_id = run_id
        self._script = script
        self._clock = clock
        self._open_store = open_store
        self._start = start
        self.bad: set[int] = set()
        self.num_alive = 1

    def train(self, actor: Actor) -> None:
        """Every attempt, and the end."""
        store = self._open_store(actor)
        log = RunLog(store, self._run_id, clock=self._clock)
        last = len(self._script.attempts)
        for number, attempt in enumerate(self._script.attempts, start=1):
            step = self._begin(log, attempt)
            for n in range(attempt.num_checkpoints):
                step += STEP
                self._checkpoint(store, log, step, number, is_bad=n in attempt.bad)
            if number < last:
                self._leave_zombie(attempt, number, step)
                _say(log, AttemptFailed(reason="worker_died"), attempt=number)
        end = Cancelled() if self._script.is_cancelled else TrainingFinished(step=step)
        _say(log, end, attempt=last)
        self.num_alive -= 1

    def _begin(self, log: RunLog, attempt: Attempt) -> int:
        """Start an attempt; returns the step that it stands at."""
        _through(log.refresh)
        lineage, place = self._resumable(log.lineage), attempt.resumes_at
        origin = lineage[int(place * len(lineage))] if lineage and place is not None else None
        _say(log, AttemptStarted(runner_id="r", resumed_from=origin.seq if origin else None), attempt=None)
        return origin.step if origin else 0

    def _resumable(self, lineage: list[CheckpointCommitted]) -> list[CheckpointCommitted]:
        """Where an attempt may start: where nothing that is needed can have been swept up meanwhile."""
        policy = self._script.policy
        if policy.keeps_all:
            return lineage
        every = policy.keep_every_steps
        return [entry for entry in lineage[:-1] if every and entry.step % every == 0] + lineage[-1:]

    def _leave_zombie(self, attempt: Attempt, number: int, step: int) -> None:
        if not attempt.num_zombie:
            return

        def haunt(actor: Actor) -> None:
            store = self._open_store(actor)
            log = RunLog(store, self._run_id, clock=self._clock)
            with suppress(ConflictError):  # fenced, or the run has ended
                for n in range(1, attempt.num_zombie + 1):
                    self._checkpoint(store, log, step + n * STEP, number, is_bad=False)
            self.num_alive -= 1

        self.num_alive += 1
        self._start(f"zombie-{number}", haunt)

    def _checkpoint(self, store: ObjectStore, log: RunLog, step: int, attempt: int, *, is_bad: bool) -> None:
        body, spec = checkpoint_body(step, attempt, is_bad=is_bad)
        nonce = layout.new_nonce()
        key = layout.checkpoint_prefix(self._run_id, attempt=attempt, step=step, nonce=nonce) + layout.MODEL_FILE
        ref = FileRef(key=key, size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest())
        _through(lambda: store.put(key, body))
        entry = CheckpointCommitted(step=step, files={layout.MODEL_FILE: ref}, spec_digest=spec)
        written = _say(log, entry, attempt=attempt)
        if is_bad:
            self.bad.add(written.seq)


def _say(log: RunLog, entry: LogEntry, *, attempt: int | None) -> LogEntry:
    return _through(lambda: log.append(entry, attempt=attempt))


def _through(call: Callable[[], T]) -> T:
    """Call until the store answers: a trainer's patience is longer than any fault of a simulation."""
    while True:
        try:
            return call()
        except TransientError:
            continue
