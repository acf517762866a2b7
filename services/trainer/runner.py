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
from structlog.contextvars import bound_contextvars

from services.trainer import telemetry
from services.trainer.admission import Room, scaling_of
from services.trainer.budget import final_failure, is_over_time, waited_s
from services.trainer.child import DRIVER
from services.trainer.failure import (
    RUNNER_LOST,
    RUNNER_STOPPED,
    Failure,
)
from services.trainer.held import Graces, HeldRun
from services.trainer.known import KnownRuns
from services.trainer.lost import LostRunners
from services.trainer.origin import find_origin
from services.trainer.waiting import WaitingRuns
from wa_core.catalog.runs import list_active, list_queue
from wa_core.errors import ConflictError, NotFoundError, TransientError, WeightAveragingError
from wa_core.records import (
    TRAINING,
    AttemptFailed,
    AttemptStarted,
    Cancelled,
    Failed,
    Paused,
    RunState,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet
    from pathlib import Path

    from wa_core.catalog.runs import RunLog
    from wa_core.clock import Clock
    from wa_core.records import RunSpec
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

_WITH_WORKERS = frozenset({RunState.STARTING, RunState.RUNNING, RunState.PAUSING})
_WILL_WAIT = frozenset({RunState.PAUSING, RunState.PAUSED})


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """How a runner behaves. Times in seconds; drivers keep temporary files below `folder`."""

    runner_id: str
    max_concurrent_runs: int = 1
    max_runs_per_owner: int | None = None
    driver: Sequence[str] = DRIVER
    folder: Path | None = None
    heartbeat_interval_s: float = 2.0
    look_around_interval_s: float = 2.0
    lost_after_s: float = 10.0
    graces: Graces = field(default_factory=Graces)
    stop_grace_s: float = 5.0
    farewell_s: float = 3.0


class Runner:
    """See the module. `tick` does whatever is due, and says whether anything was.

    Args:
        store: the bucket.
        config: how to behave.
        clock: the time.
        totals: what the cluster has, by resource; None while that is not known.
    """

    def __init__(
        self,
        store: ObjectStore,
        config: RunnerConfig,
        clock: Clock,
        *,
        totals: Callable[[], Mapping[str, float] | None],
    ) -> None:
        self.store = store
        self.config = config
        self.clock = clock
        self.held: dict[str, HeldRun] = {}
        self._totals = totals
        self._known = KnownRuns(store, clock)
        self._waiting = WaitingRuns(store, clock)
        self._lost = LostRunners(store, runner_id=config.runner_id, lost_after_s=config.lost_after_s, clock=clock)
        self._looked_at = float("-inf")
        self._got_on_at = clock.monotonic()

    def idle_s(self) -> float:
        """How many seconds ago a tick ended well; may be asked from any thread."""
        return self.clock.monotonic() - self._got_on_at

    def tick(self) -> bool:
        """Beat, reap, stop, claim and take over.

        Raises:
            TransientError: the store is away; call again later.
        """
        try:
            did_something = self._do_what_is_due()
        except TransientError:
            # No sign of life could move meanwhile, so that one stood still proves nothing: watch them anew.
            self._lost.watch_anew()
            for held in self.held.values():
                held.watch_anew(now=self.clock.monotonic())
            raise
        self._got_on_at = self.clock.monotonic()
        return did_something

    def shut_down(self) -> None:
        """Stop all drivers; their runs are left to be recovered by the next runner."""
        children = [held.child for held in self.held.values()]
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

    def _do_what_is_due(self) -> bool:
        before = set(self.held)
        for held in list(self.held.values()):
            with self._one_run(held.run_id):
                self._attend(held)
        is_due = self.clock.monotonic() - self._looked_at >= self.config.look_around_interval_s
        if is_due or self._has_place:
            waiting = list(list_queue(self.store))
            if is_due:
                self._looked_at = self.clock.monotonic()
                self._look_around({run_id for _, run_id in waiting})
            self._walk_queue(waiting)
        return set(self.held) != before

    @contextlib.contextmanager
    def _one_run(self, run_id: str) -> Iterator[None]:
        """Keep one run's trouble from the others; an absent store is everybody's, and passes through."""
        try:
            with bound_contextvars(run_id=run_id):
                yield
        except TransientError:
            raise
        except (ConflictError, NotFoundError) as error:
            log.info("left_to_another", run_id=run_id, reason=error.message)
        except WeightAveragingError as error:
            log.warning("run_unreadable", run_id=run_id, reason=error.message)

    # -- runs that are held -------------------------------------------------------------------------------

    def _attend(self, held: HeldRun) -> None:
        if not held.child.is_alive:
            self._conclude(held)
            return
        now = self.clock.monotonic()
        held.log.refresh()
        if held.is_taken_away:
            log.info("fenced", run_id=held.run_id, attempt=held.child.attempt, state=held.log.state)
            self._drop(held)
            return
        if now - held.beaten_at >= self.config.heartbeat_interval_s:
            held.beat(self.store, runner_id=self.config.runner_id, at=self.clock.now())
            held.beaten_at = now
            held.watch(self.store, now=now, totals=self._totals())
            if is_over_time(held.log.entries, held.spec.request, now=self.clock.now()):
                held.end_for_time()
        if held.is_attempt_over or held.end_reason is not None:
            held.press(self.store, self.config.graces, now=now)

    def _conclude(self, held: HeldRun) -> None:
        """The driver has ended: is the run over, or does it need another attempt?"""
        held.log.refresh()
        if held.log.state not in TRAINING or held.log.attempt != held.child.attempt:
            log.info("attempt_ended", run_id=held.run_id, attempt=held.child.attempt, state=held.log.state)
            self._drop(held)
            return
        failure = held.child.reap()
        self.held.pop(held.run_id, None)
        try:
            self._recover(held.spec, held.log, held.end_reason or failure)
        except TransientError:
            self.held[held.run_id] = held  # its reason must not be forgotten
            raise
        held.span.end(error=(held.end_reason or failure).reason)

    def _drop(self, held: HeldRun) -> None:
        held.child.reap()
        held.span.end()
        self.held.pop(held.run_id, None)

    def _leave_all(self) -> None:
        """At the runner's own end: say that the attempts are over, so that another runner need not wait."""
        for held in self.held.values():
            with contextlib.suppress(WeightAveragingError):
                held.log.append(
                    AttemptFailed(reason=RUNNER_STOPPED, message="the runner was stopped"),
                    attempt=held.child.attempt,
                    expect=TRAINING,
                )
            held.child.reap()
            held.span.end(error=RUNNER_STOPPED)

    # -- what follows an attempt --------------------------------------------------------------------------

    def _recover(self, spec: RunSpec, run_log: RunLog, failure: Failure) -> None:
        """Record a failed attempt, and start the next one if there is a point in it, and room."""
        attempt = run_log.attempt
        if run_log.desired_state == "cancelled":
            run_log.append(Cancelled(), attempt=attempt, expect=TRAINING)
            return
        if run_log.desired_state == "paused":
            run_log.append(Paused(), attempt=attempt, expect=TRAINING)
            return
        if run_log.state is not RunState.RECOVERING:
            log.warning("attempt_failed", run_id=spec.run_id, attempt=attempt, **failure.model_dump())
            entry = AttemptFailed(reason=failure.reason, message=failure.message)
            run_log.append(entry, attempt=attempt, expect=TRAINING)
            telemetry.FAILED_ATTEMPTS.labels(telemetry.known(failure.reason)).inc()
        final = final_failure(run_log.entries, spec.request, now=self.clock.now())
        if final is not None:
            run_log.append(Failed(reason=final.reason, message=final.message), attempt=attempt)
            telemetry.RUNS_FAILED.labels(telemetry.known(final.reason)).inc()
            log.error("run_failed", run_id=spec.run_id, reason=final.reason, message=final.message)
        elif self._may_start(spec, run_log, room := self._room()):
            self._start(spec, run_log, room, expect={RunState.RECOVERING})

    def _start(self, spec: RunSpec, run_log: RunLog, room: Room, *, expect: Collection[RunState]) -> None:
        """Begin the next attempt: say so first, so that the one before it is fenced before this one trains."""
        scaling = room.fit(spec.request.scaling)
        entry = AttemptStarted(
            runner_id=self.config.runner_id,
            resumed_from=find_origin(self.store, run_log),
            num_workers=scaling.num_workers,
        )
        attempt = run_log.append(entry, expect=expect).attempt
        room.take(scaling, owner=spec.owner)
        held = HeldRun.begin(
            spec, run_log, command=self.config.driver, folder=self.config.folder, now=self.clock.monotonic()
        )
        telemetry.ATTEMPTS.inc()
        log.info("attempt_started", run_id=spec.run_id, attempt=attempt, driver_pid=held.child.pid)
        self.held[spec.run_id] = held

    # -- runs that wait -----------------------------------------------------------------------------------

    def _walk_queue(self, waiting: Sequence[tuple[str, str]]) -> None:
        """Start waiting runs in their order, as far as there is room; end those that have waited too long."""
        room = self._room() if waiting else None
        is_held_up = False
        for marker, run_id in waiting:
            if run_id in self.held or room is None:
                continue  # it was asked to go back, and its old attempt is coming to its end
            with self._one_run(run_id):
                run_log = self._known.log_of(run_id)
                run_log.refresh()
                if run_log.entries and self._known.spec_of(run_id).trainer == "own":
                    self.store.delete(marker)  # its owner takes it up again, no runner
                    continue
                if run_log.state is RunState.QUEUED and run_log.entries:
                    is_held_up |= self._claim(run_log, room, is_held_up=is_held_up)
                if run_log.entries and run_log.state not in _WILL_WAIT | {RunState.QUEUED}:
                    self.store.delete(marker)

    def _claim(self, run_log: RunLog, room: Room, *, is_held_up: bool) -> bool:
        """Start a queued run, or let it wait; returns whether those behind it have to wait as well."""
        spec = self._known.spec_of(run_log.run_id)
        if run_log.desired_state == "cancelled":
            run_log.append(Cancelled(), expect={RunState.QUEUED})
            return False
        wait = room.wait_of(spec.request, owner=spec.owner)
        if self._waiting.has_expired(spec, run_log):
            self._waiting.expire(spec, run_log, wait)
            return False
        self._waiting.say(run_log, wait)
        if wait is None and self._has_place and not is_held_up:
            self._start(spec, run_log, room, expect={RunState.QUEUED})
            telemetry.QUEUE_SECONDS.observe(waited_s(run_log.entries, now=self.clock.now()))
        return wait is not None and wait.holds_up_others

    def _may_start(self, spec: RunSpec, run_log: RunLog, room: Room) -> bool:
        wait = room.wait_of(spec.request, owner=spec.owner)
        self._waiting.say(run_log, wait)
        return wait is None and self._has_place

    @property
    def _has_place(self) -> bool:
        return len(self.held) < self.config.max_concurrent_runs

    def _room(self) -> Room:
        """What the runs that train now leave of the cluster, those of other runners as far as we know of them."""
        room = Room(self._totals(), max_runs_per_owner=self.config.max_runs_per_owner)
        training = {run_id for run_id, run_log in self._known.logs.items() if run_log.state in _WITH_WORKERS}
        for run_id in training | self.held.keys():
            with self._one_run(run_id):
                spec = self._known.spec_of(run_id)
                if spec.trainer == "service":
                    run_log = self.held[run_id].log if run_id in self.held else self._known.logs[run_id]
                    room.take(scaling_of(spec.request, run_log.entries), owner=spec.owner)
        return room

    # -- other runners' runs ------------------------------------------------------------------------------

    def _look_around(self, waiting: AbstractSet[str]) -> None:
        """Read the logs of all active runs; go on with those whose runner is gone."""
        active = set(list_active(self.store))
        self._known.forget_others(active, held=self.held.keys())
        self._waiting.forget_others(active)
        self._lost.keep(active)
        for run_id in sorted(active - waiting - self.held.keys()):
            with self._one_run(run_id):
                run_log = self._known.log_of(run_id)
                run_log.refresh()
                if not run_log.entries:
                    continue  # being submitted at this moment
                if self._known.spec_of(run_id).trainer == "own":
                    self._end_if_unwanted(run_log)
                elif run_log.state is RunState.QUEUED:
                    self._waiting.put_back(self._known.spec_of(run_id))
                elif run_log.state in TRAINING and self._has_place and self._lost.has_lost(run_log):
                    self._take_over(run_log)
        logs = {**self._known.logs, **{run_id: held.log for run_id, held in self.held.items()}}
        states = [run_log.state for run_log in logs.values() if run_log.entries]
        telemetry.observe_runs(states, num_queued=len(waiting), num_held=len(self.held))

    def _end_if_unwanted(self, run_log: RunLog) -> None:
        """Cancel an owner's run once its trainer, which should have seen that it is unwanted, is not heard of."""
        is_unwanted = run_log.desired_state == "cancelled" and run_log.state in TRAINING
        if is_unwanted and self._lost.is_silent(run_log.run_id, who="trainer"):
            run_log.append(Cancelled(), attempt=run_log.attempt, expect=TRAINING)

    def _take_over(self, run_log: RunLog) -> None:
        if run_log.state is not RunState.RECOVERING:
            log.warning("run_taken_over", run_id=run_log.run_id, attempt=run_log.attempt)
        failure = Failure(reason=RUNNER_LOST, message="the runner of the attempt is gone")
        self._recover(self._known.spec_of(run_log.run_id), run_log, failure)
