"""The averaging worker: one tick takes one step for every run that is its own, so no run starves another."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import structlog
from structlog.contextvars import bound_contextvars

from services.averager import telemetry
from services.averager.follower import RunFollower
from services.averager.janitor import Janitor
from services.averager.lease import Lease, Worker
from wa_core.catalog.runs import list_active
from wa_core.errors import RunNotFoundError, StoreAuthError, TransientError, WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.averager.assessor import Assessor
    from services.averager.idle_worker import IdleWorker
    from services.averager.scratch import Scratch
    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

TROUBLE_PAUSE_S = 10.0


class GivenUpError(WeightAveragingError):
    """Long work was broken off; not a passing trouble, so nothing tries again."""

    kind = "given_up"


class Averager:
    """Follows the active runs of one bucket, sharing them with other averagers.

    Args:
        store: the bucket.
        clock: the time source.
        assessor: measures weights; closed by its owner.
        scratch: working space; closed by its owner.
        should_stop: asked in the middle of long work; when true, the work is given up.
        publish_every_folds: while behind, a generation comes after so many checkpoints.
        assess_interval_s: while training goes on, assessing starts at most so often.
        idle_workers: do other jobs when there is nothing to fold; closed by their owner.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        clock: Clock,
        assessor: Assessor,
        scratch: Scratch,
        should_stop: Callable[[], bool] = lambda: False,
        publish_every_folds: int = 8,
        assess_interval_s: float = 5.0,
        idle_workers: Sequence[IdleWorker] = (),
    ) -> None:
        self._idle_workers = idle_workers
        self._store = store
        self._clock = clock
        self._assessor = assessor
        self._scratch = scratch
        self._should_stop = should_stop
        self._publish_every_folds = publish_every_folds
        self._assess_interval_s = assess_interval_s
        self._janitor = Janitor(store, clock=clock)
        self._worker = Worker()
        self._followers: dict[str, RunFollower] = {}
        self._leases: dict[str, Lease] = {}
        self._paused_until: dict[str, float] = {}
        self._last_stepped = ""
        self._got_on_at = clock.monotonic()

    def idle_s(self) -> float:
        """How many seconds ago a tick ended, or long work got on; may be asked from any thread."""
        return self._clock.monotonic() - self._got_on_at

    def tick(self) -> bool:
        """Take one step for each run that nobody else works on; returns whether any had something to do.

        Raises:
            TransientError: the store is away.
            StoreAuthError: the store refuses the credentials.
        """
        self._collect_assessed()
        active = set(list_active(self._store))
        for gone in self._leases.keys() - active:
            self._drop(gone)
            del self._leases[gone]
        # On from the run that was last: one whose objects cannot be read, and so ends the tick, stops no other.
        in_turn = sorted(active, key=lambda run_id: (run_id <= self._last_stepped, run_id))
        did = [self._step(run_id) for run_id in in_turn]
        self._janitor.sweep_if_due(held=self._followers.keys(), active=active)
        self._observe()
        for idle_worker in self._idle_workers:
            idle_worker.work(is_idle=not any(did))
        return any(did)

    def close(self) -> None:
        """Hand the runs over to other averagers.

        Raises:
            TransientError: the store is away; the others find out by themselves.
        """
        for run_id in list(self._followers):
            self._drop(run_id)
        for lease in self._leases.values():
            lease.release()

    def _step(self, run_id: str) -> bool:
        if self._clock.monotonic() < self._paused_until.get(run_id, 0.0):
            return False
        self._last_stepped = run_id
        try:
            with bound_contextvars(run_id=run_id):
                return self._hold(run_id) and self._follower(run_id).step()
        except (TransientError, StoreAuthError):
            raise
        except GivenUpError:
            return False
        except RunNotFoundError:
            return False  # a marker whose submission has not got further, or never will
        except WeightAveragingError as error:
            said = {"code": error.code, "error": error.message, "retry_in_s": TROUBLE_PAUSE_S}
            log.error("run_stalled", run_id=run_id, **said)  # noqa: TRY400  the message says it all
            self._pause(run_id, reason=error.code, detail=error.message)
            return False
        except Exception:  # the outermost place that knows the run: one broken run must not stop the others
            log.exception("run_in_trouble", run_id=run_id, retry_in_s=TROUBLE_PAUSE_S)
            self._pause(run_id, reason="internal", detail="the averager has failed; its log says how")
            return False

    def _hold(self, run_id: str) -> bool:
        """Whether the run is ours; what we had of it is dropped when it is not, or not any more."""
        if run_id not in self._leases:
            self._leases[run_id] = Lease(self._store, run_id, worker=self._worker, clock=self._clock)
        follower = self._followers.get(run_id)
        is_ours = self._leases[run_id].hold(
            attempt=follower.attempt if follower else 0, detail=follower.doing if follower else ""
        )
        if not is_ours:
            self._drop(run_id)
        return is_ours

    def _follower(self, run_id: str) -> RunFollower:
        if run_id not in self._followers:
            self._followers[run_id] = RunFollower(
                self._store,
                run_id,
                clock=self._clock,
                assessor=self._assessor,
                scratch=self._scratch,
                on_progress=lambda: self._keep_on(run_id),
                publish_every_folds=self._publish_every_folds,
                assess_interval_s=self._assess_interval_s,
            )
        return self._followers[run_id]

    def _keep_on(self, run_id: str) -> None:
        """In the middle of long work: stay the holder of the run, or give the work up."""
        if self._should_stop():
            raise GivenUpError("the work was given up because the process is stopping")
        self._got_on_at = self._clock.monotonic()
        self._leases[run_id].hold(attempt=self._followers[run_id].attempt, detail=self._followers[run_id].doing)

    def _pause(self, run_id: str, *, reason: str, detail: str) -> None:
        self._drop(run_id)
        self._paused_until[run_id] = self._clock.monotonic() + TROUBLE_PAUSE_S
        self._leases[run_id].report(reason=reason, detail=detail)

    def _drop(self, run_id: str) -> None:
        if (follower := self._followers.pop(run_id, None)) is not None:
            follower.close()

    def _collect_assessed(self) -> None:
        finished = self._assessor.poll()
        if finished is None:
            return
        follower = self._followers.get(finished.run_id)
        if follower is None:  # the run is somebody else's by now, who assesses it again
            shutil.rmtree(finished.folder, ignore_errors=True)
        else:
            follower.take_assessed(finished)

    def _observe(self) -> None:
        behind = [follower.behind() for follower in self._followers.values()]
        telemetry.RUNS_HELD.set(len(behind))
        telemetry.CHECKPOINTS_BEHIND.set(sum(count for count, _ in behind))
        telemetry.SECONDS_BEHIND.set(max((seconds for _, seconds in behind), default=0.0))
        self._got_on_at = self._clock.monotonic()
