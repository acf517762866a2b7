"""Claims queued runs and sees each of them through: one driver process per run, recovered when it fails.

The runner keeps nothing that matters: the run log says which attempt holds a run and who started it, so another
runner, or this one restarted, can take over. All claims are create-once entries; of two runners that want the
same run one gets a conflict and leaves it alone. It knows nothing of Ray or torch.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog
from pydantic import ValidationError

from services.trainer.child import DRIVER, Child
from services.trainer.failure import HOPELESS, NOT_COUNTED, RUNNER_LOST, RUNNER_STOPPED, Failure
from services.trainer.identity import is_provably_gone
from wa_core import layout
from wa_core.catalog.checkpoints import find_faults
from wa_core.catalog.runs import RunLog, fetch_spec, list_active, list_queue
from wa_core.errors import (
    ConflictError,
    NotFoundError,
    ObjectNotFoundError,
    TransientError,
    WeightAveragingError,
)
from wa_core.records import AttemptFailed, AttemptStarted, AverageAdded, Cancelled, Failed, Heartbeat, RunState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

_TRAINING = frozenset(state for state in RunState if state.is_training)

_PATIENCE_S = 5.0  # a tick must not outlast the time to stop; the next one reads the log again


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """How a runner behaves. Times in seconds."""

    runner_id: str
    max_concurrent_runs: int = 1
    driver: Sequence[str] = DRIVER
    heartbeat_interval_s: float = 2.0
    look_for_orphans_interval_s: float = 2.0
    lost_after_s: float = 10.0
    cancel_grace_s: float = 45.0
    start_cancel_grace_s: float = 5.0
    interrupt_grace_s: float = 15.0
    stop_grace_s: float = 5.0
    farewell_s: float = 3.0


@dataclass(slots=True)
class _Held:
    """A run that this runner sees through."""

    log: RunLog
    child: Child
    beaten_at: float = -1e9
    cancel_seen_at: float | None = None
    is_interrupted: bool = False


@dataclass(slots=True)
class Runner:
    """See the module. `tick` does whatever is due, and says whether anything was."""

    store: ObjectStore
    config: RunnerConfig
    clock: Clock
    _held: dict[str, _Held] = field(default_factory=dict)
    _logs: dict[str, RunLog] = field(default_factory=dict)
    _heartbeats: dict[str, tuple[bytes | None, float]] = field(default_factory=dict)
    _own: dict[str, bool] = field(default_factory=dict)
    _looked_at: float = -1e9

    def tick(self) -> bool:
        """Beat, reap, cancel, claim and take over.

        Raises:
            TransientError: the store is away; call again later.
        """
        try:
            return self._do_what_is_due()
        except TransientError:
            # No heartbeat could move meanwhile, so that one stood still proves nothing: watch them anew.
            self._heartbeats.clear()
            raise

    def _do_what_is_due(self) -> bool:
        num_before = len(self._held)
        for held in list(self._held.values()):
            with self._one_run(held.log.run_id):
                self._attend(held)
        self._claim_queued()
        if self.clock.monotonic() - self._looked_at >= self.config.look_for_orphans_interval_s:
            self._looked_at = self.clock.monotonic()
            self._take_over_orphans()
        return len(self._held) != num_before

    def shut_down(self) -> None:
        """Stop all drivers; their runs are left to be recovered by the next runner."""
        children = [held.child for held in self._held.values()]
        for child in children:
            child.interrupt()
        deadline = self.clock.monotonic() + self.config.stop_grace_s
        for child in children:
            child.wait(max(0.0, deadline - self.clock.monotonic()))
            child.kill()
        # The drivers are gone; telling others is a courtesy that an absent store must not turn into a hang.
        farewell = threading.Thread(target=self._leave_all, daemon=True)
        farewell.start()
        farewell.join(self.config.farewell_s)

    @contextlib.contextmanager
    def _one_run(self, run_id: str) -> Iterator[None]:
        """Keep one run's trouble from the others; an absent store is everybody's, and passes through."""
        try:
            yield
        except TransientError:
            raise
        except (ConflictError, NotFoundError) as error:
            log.info("left_to_another", run_id=run_id, reason=error.message)
        except WeightAveragingError as error:
            log.warning("run_unreadable", run_id=run_id, reason=error.message)

    # -- runs that are held -------------------------------------------------------------------------------

    def _attend(self, held: _Held) -> None:
        if not held.child.is_alive:
            self._conclude(held)
            return
        now = self.clock.monotonic()
        if now - held.beaten_at >= self.config.heartbeat_interval_s:
            self._beat(held.log.run_id, attempt=held.child.attempt)
            held.beaten_at = now
        held.log.refresh()
        if held.log.attempt > held.child.attempt or held.log.state.is_terminal:
            log.info("fenced", run_id=held.log.run_id, attempt=held.child.attempt, state=held.log.state)
            self._drop(held)
        elif held.log.desired_state == "cancelled":
            self._press_cancel(held, now=now)

    def _press_cancel(self, held: _Held, *, now: float) -> None:
        """The training loop sees a cancel by itself; a driver that does not end is interrupted, then killed."""
        held.cancel_seen_at = now if held.cancel_seen_at is None else held.cancel_seen_at
        waited_s = now - held.cancel_seen_at
        grace_s = self.config.cancel_grace_s if self._has_trained(held) else self.config.start_cancel_grace_s
        if waited_s >= grace_s + self.config.interrupt_grace_s:
            held.child.kill()
        elif waited_s >= grace_s and not held.is_interrupted:
            held.is_interrupted = True
            held.child.interrupt()

    def _has_trained(self, held: _Held) -> bool:
        """Whether the attempt's workers have shown up, so that there may be weights worth a last checkpoint."""
        try:
            beat = Heartbeat.model_validate_json(self.store.get(layout.heartbeat(held.log.run_id, "trainer")))
        except ObjectNotFoundError:
            return False
        except ValidationError:
            return True
        return beat.attempt == held.child.attempt

    def _conclude(self, held: _Held) -> None:
        """The driver has ended: is the run over, or does it need another attempt?"""
        held.log.refresh()
        if held.log.state not in _TRAINING or held.log.attempt != held.child.attempt:
            log.info("attempt_ended", run_id=held.log.run_id, attempt=held.child.attempt, state=held.log.state)
            self._drop(held)
            return
        failure = held.child.reap()
        try:
            self._recover(held.log, failure)
        except ConflictError:
            self._forget(held.log.run_id)
            raise

    def _recover(self, run_log: RunLog, failure: Failure) -> None:
        """Record a failed attempt, and start the next one unless there is no point in it."""
        attempt = run_log.attempt
        if run_log.desired_state == "cancelled":
            run_log.append(Cancelled(), attempt=attempt, expect=_TRAINING)
            self._forget(run_log.run_id)
            return
        if run_log.state is not RunState.RECOVERING:
            log.warning("attempt_failed", run_id=run_log.run_id, attempt=attempt, **failure.model_dump())
            entry = AttemptFailed(reason=failure.reason, message=failure.message)
            run_log.append(entry, attempt=attempt, expect=_TRAINING)
        failures = [entry for entry in run_log.entries if isinstance(entry, AttemptFailed)]
        num_counted = sum(entry.reason not in NOT_COUNTED for entry in failures)
        is_hopeless = failures[-1].reason in HOPELESS
        if is_hopeless or num_counted > fetch_spec(self.store, run_log.run_id).request.max_failures:
            last = failures[-1]
            run_log.append(Failed(reason=last.reason, message=last.message), attempt=attempt)
            log.error("run_failed", run_id=run_log.run_id, reason=last.reason, message=last.message)
            self._forget(run_log.run_id)
            return
        self._start(run_log, expect={RunState.RECOVERING})

    def _leave_all(self) -> None:
        """At the runner's own end: say that the attempts are over, so that another runner need not wait."""
        for held in self._held.values():
            with contextlib.suppress(WeightAveragingError):
                held.log.append(
                    AttemptFailed(reason=RUNNER_STOPPED, message="the runner was stopped"),
                    attempt=held.child.attempt,
                    expect=_TRAINING,
                )
            held.child.reap()

    def _drop(self, held: _Held) -> None:
        held.child.reap()
        self._forget(held.log.run_id)

    def _forget(self, run_id: str) -> None:
        self._held.pop(run_id, None)
        self._heartbeats.pop(run_id, None)

    # -- runs that are taken ------------------------------------------------------------------------------

    @property
    def _has_room(self) -> bool:
        return len(self._held) < self.config.max_concurrent_runs

    def _claim_queued(self) -> None:
        """Take waiting runs in their order; cancel at once those that nobody wants any more."""
        for marker, run_id in list_queue(self.store):
            with self._one_run(run_id):
                self._claim(marker, self._log_of(run_id))

    def _claim(self, marker: str, run_log: RunLog) -> None:
        run_log.refresh()
        if not run_log.entries:
            return  # being submitted at this moment
        if run_log.state is RunState.QUEUED and not self._is_own(run_log):
            if run_log.desired_state == "cancelled":
                run_log.append(Cancelled(), expect={RunState.QUEUED})
            elif self._has_room:
                self._start(run_log, expect={RunState.QUEUED})
            else:
                return
        self.store.delete(marker)

    def _take_over_orphans(self) -> None:
        """Go on with runs whose runner is gone."""
        active = set(list_active(self.store))
        self._logs = {run_id: run_log for run_id, run_log in self._logs.items() if run_id in active}
        self._heartbeats = {run_id: seen for run_id, seen in self._heartbeats.items() if run_id in active}
        self._own = {run_id: is_own for run_id, is_own in self._own.items() if run_id in active}
        for run_id in sorted(active - self._held.keys()):
            if self._has_room:
                with self._one_run(run_id):
                    self._take_over(self._log_of(run_id))

    def _take_over(self, run_log: RunLog) -> None:
        run_log.refresh()
        starts = [entry for entry in run_log.entries if isinstance(entry, AttemptStarted)]
        if run_log.state not in _TRAINING or not starts:
            return
        if self._is_own(run_log):
            self._end_if_unwanted(run_log)
            return
        if not self._is_gone(run_log, starts[-1].runner_id):
            return
        log.warning(
            "run_taken_over", run_id=run_log.run_id, attempt=run_log.attempt, from_runner=starts[-1].runner_id
        )
        self._recover(run_log, Failure(reason=RUNNER_LOST, message="the runner of the attempt is gone"))

    def _is_own(self, run_log: RunLog) -> bool:
        """Whether its owner trains it: it is never claimed or taken over, however long nothing is heard of it."""
        if run_log.run_id not in self._own:
            self._own[run_log.run_id] = fetch_spec(self.store, run_log.run_id).trainer == "own"
        return self._own[run_log.run_id]

    def _end_if_unwanted(self, run_log: RunLog) -> None:
        """Cancel an owner's run once its trainer, which should have seen that it is unwanted, is not heard of."""
        if run_log.desired_state == "cancelled" and self._is_silent(run_log.run_id, who="trainer"):
            run_log.append(Cancelled(), attempt=run_log.attempt, expect=_TRAINING)

    def _log_of(self, run_id: str) -> RunLog:
        """The run's log, kept between ticks so that only what is new is read."""
        return self._logs.setdefault(run_id, RunLog(self.store, run_id, clock=self.clock, patience_s=_PATIENCE_S))

    def _is_gone(self, run_log: RunLog, runner_id: str) -> bool:
        """Whether a runner is gone: it said so, its process has ended, or its heartbeat stood still as we watched.

        What a heartbeat says is only compared with what it said before, so clocks that disagree do no harm.
        """
        last = next(entry for entry in reversed(run_log.entries) if not isinstance(entry, AverageAdded))
        run_id = run_log.run_id
        if isinstance(last, AttemptFailed) and last.reason == RUNNER_STOPPED:
            return True
        if runner_id == self.config.runner_id or is_provably_gone(runner_id):
            return True
        return self._is_silent(run_id, who="runner")

    def _is_silent(self, run_id: str, *, who: str) -> bool:
        """Whether a heartbeat has stood still for long while this runner watched it."""
        now = self.clock.monotonic()
        beat = self._fetch_beat(run_id, who=who)
        seen, since = self._heartbeats.get(run_id, (None, now))
        if run_id not in self._heartbeats or seen != beat:
            self._heartbeats[run_id] = (beat, now)
            return False
        return now - since >= self.config.lost_after_s

    def _start(self, run_log: RunLog, *, expect: set[RunState]) -> None:
        """Begin the next attempt: say so first, so that the one before it is fenced before this one trains."""
        self._held.pop(run_log.run_id, None)
        faults = find_faults(run_log.run_id, run_log.lineage)  # what no average folds, no attempt grows from
        checkpoints = [checkpoint for checkpoint in run_log.lineage if checkpoint.seq not in faults]
        entry = AttemptStarted(
            runner_id=self.config.runner_id, resumed_from=checkpoints[-1].seq if checkpoints else None
        )
        attempt = run_log.append(entry, expect=expect).attempt
        child = Child(run_log.run_id, attempt, command=self.config.driver)
        log.info("attempt_started", run_id=run_log.run_id, attempt=attempt, driver_pid=child.pid)
        self._held[run_log.run_id] = _Held(run_log, child)

    # -- signs of life ------------------------------------------------------------------------------------

    def _beat(self, run_id: str, *, attempt: int) -> None:
        beat = Heartbeat(
            who="runner", at=self.clock.now(), attempt=attempt, detail=f"runner {self.config.runner_id}"
        )
        self.store.put(layout.heartbeat(run_id, "runner"), beat.model_dump_json().encode())

    def _fetch_beat(self, run_id: str, *, who: str) -> bytes | None:
        try:
            return self.store.get(layout.heartbeat(run_id, who))
        except ObjectNotFoundError:
            return None
