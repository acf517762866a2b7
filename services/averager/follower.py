"""Follows one run: asks the policy what is due, and does it, one action a step.

All it knows is in the bucket; it may be dropped at any moment and built again. Two followers of one run, in two
averagers, are safe: the loser of a generation is fenced and reads again.
"""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from typing import TYPE_CHECKING

import structlog

from services.averager import telemetry
from services.averager.assessments import Assessments
from services.averager.average import RunningAverage
from services.averager.checkpoints import open_checkpoint
from services.runtime import tracing
from wa_core import layout
from wa_core.averaging.policy import Assess, Finish, Fold, Publish, Rewind, RunView, Wait, next_action
from wa_core.averaging.streaming import fold_source
from wa_core.averaging.windows import WindowRule
from wa_core.catalog.catch_up import plan_catch_up
from wa_core.catalog.holdings import fetch_holdings
from wa_core.catalog.rebuild import Rebuild
from wa_core.catalog.runs import RunLog, fetch_spec, mark_active, requested_averages
from wa_core.errors import ConflictError, CorruptError, FencedError, IncompatibleError, InvalidInputError
from wa_core.records import CheckpointCommitted, RunState, Succeeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractContextManager

    from services.averager.assess_job import FinishedJob
    from services.averager.assessor import Assessor
    from services.averager.scratch import Scratch
    from services.runtime.spans import Span
    from wa_core.averaging.files.sources import FilesSource
    from wa_core.averaging.policy import Action
    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

READS_BEFORE_REJECTION = 3
_PLANS = 3
#: Faults of what was committed, which reading again cannot heal.
_FINAL = frozenset({"object_missing", "record_unreadable", "foreign_key", "not_finite", "name_collision"})


class RunFollower:
    """Everything an averager does for one run.

    Args:
        store: the bucket.
        run_id: the run.
        clock: the time source.
        assessor: measures weights, one job at a time, whichever run's.
        scratch: working space.
        on_progress: called from time to time in the middle of long work; what it raises ends that work.
        publish_every_folds: while behind, a generation comes after so many checkpoints.
        assess_interval_s: while training goes on, assessing starts at most so often.
    """

    def __init__(
        self,
        store: ObjectStore,
        run_id: str,
        *,
        clock: Clock,
        assessor: Assessor,
        scratch: Scratch,
        on_progress: Callable[[], None] = lambda: None,
        publish_every_folds: int = 8,
        assess_interval_s: float = 5.0,
    ) -> None:
        self.run_id = run_id
        self.doing = "reading"
        self._store = store
        self._clock = clock
        self._scratch = scratch
        self._on_progress = on_progress
        self._publish_every_folds = publish_every_folds
        self._log = RunLog(store, run_id, clock=clock)
        self._spec = fetch_spec(store, run_id)
        self._assessments = Assessments(
            store,
            self._spec,
            clock=clock,
            assessor=assessor,
            scratch=scratch,
            on_progress=on_progress,
            interval_s=assess_interval_s,
        )
        self._averages: dict[str, RunningAverage] = {}
        self._num_plans: Counter[str] = Counter()
        self._faults: dict[int, list[CorruptError | IncompatibleError]] = {}

    @property
    def attempt(self) -> int:
        """The attempt that the run is at."""
        return self._log.attempt

    def step(self) -> bool:
        """Do the one thing that is due; returns whether there was any.

        Raises:
            TransientError: the store is away; what was in memory is sound, or will be read again.
        """
        self._log.refresh()
        self._log.renew_hint()
        self._adopt()
        self._mend()
        if self._assessments.record(self._averages, lineage=self._log.lineage):
            return True
        action = next_action(self._view(), publish_every_folds=self._publish_every_folds)
        self.doing = type(action).__name__.lower()
        try:
            self._act(action)
        except FencedError as error:
            telemetry.CONFLICTS.inc()
            log.info("fenced", run_id=self.run_id, error=error.message)
            return True
        return not isinstance(action, Wait)

    def take_assessed(self, finished: FinishedJob) -> None:
        """A job that this follower started has ended; what came of it is recorded by the next `step`."""
        self._assessments.take(finished)

    def close(self) -> None:
        """Give memory and scratch space back."""
        for average in self._averages.values():
            average.close()
        self._assessments.close()

    def behind(self) -> tuple[int, float]:
        """How many checkpoints the slowest average lacks, and how old the oldest of them is in seconds."""
        cursor = min((average.manifest.cursor for average in self._averages.values()), default=0)
        waiting = [entry for entry in self._log.lineage if entry.seq > cursor] if self._averages else []
        since = next((entry.at for entry in waiting if entry.at), None)
        return len(waiting), max(0.0, (self._clock.now() - since).total_seconds()) if since else 0.0

    def _adopt(self) -> None:
        """Begin to follow averages that were added to the run."""
        for request in requested_averages(self._spec, self._log.entries):
            if request.name not in self._averages:
                self._averages[request.name] = RunningAverage(
                    self._store,
                    self.run_id,
                    request,
                    clock=self._clock,
                    scratch=self._scratch,
                    on_progress=self._on_progress,
                )

    def _mend(self) -> None:
        """Load what is not in memory, or was left half-way through a fold."""
        self._load(average for average in self._averages.values() if average.is_broken)
        submitted = {request.name for request in self._spec.request.averages}
        for average in self._averages.values():
            is_added = average.name not in submitted
            if is_added and average.is_unstarted and not self._num_plans[average.name]:
                self._catch_up(average)

    def _catch_up(self, average: RunningAverage) -> None:
        """Begin an added average: from the kept checkpoints, or, where some are gone, as near to it as can be."""
        self._num_plans[average.name] += 1
        if not self._log.lineage:
            return
        try:
            plan = plan_catch_up(fetch_holdings(self._store, self._spec, self._log.entries), average.rule)
            if isinstance(plan, Rebuild):
                average.begin_rebuilt(plan, attempt=self._log.attempt)
                self._load([average])
                log.info("rebuilt", run_id=self.run_id, average=average.name, profile_error=plan.profile_error)
            elif isinstance(average.rule, WindowRule):
                self._pass_over(average, before=plan.seqs[0] if plan.seqs else 0)
        except FencedError:
            self._load([average])  # another averager has begun it
        except CorruptError as error:
            log.warning("rebuild_failed", run_id=self.run_id, average=average.name, error=error.message)
            self._load([average])
            if self._num_plans[average.name] < _PLANS:
                self._catch_up(average)  # from what is there now
        except InvalidInputError as error:
            # Folded all the same: what is gone is recorded as rejected, and the coefficients say what is in it.
            log.warning("cannot_rebuild", run_id=self.run_id, average=average.name, error=error.message)

    def _pass_over(self, average: RunningAverage, *, before: int) -> None:
        """Begin an added window with what is in it; what it has left behind may be gone."""
        if passed := [entry for entry in self._log.lineage if entry.seq < before]:
            average.pass_over(passed)
            average.publish(attempt=self._log.attempt)

    def _load(self, averages: Iterable[RunningAverage]) -> None:
        for average in averages:
            average.look()
            # After the look: a log that is older than a generation would make it seem to be of another branch.
            self._log.refresh()
            average.load({entry.seq: entry for entry in self._log.lineage})

    def _view(self) -> RunView:
        state = self._log.state
        return RunView(
            lineage=[entry.seq for entry in self._log.lineage],
            is_training_over=state.is_terminal or state is RunState.FINALIZING,
            is_assessment_due=self._assessments.is_due,
            is_assessor_idle=self._assessments.is_possible,
            averages=[average.view for average in self._averages.values()],
            assessing=self._assessments.under_way,
            branched_at=self._log.branched_at,
        )

    def _act(self, action: Action) -> None:
        match action:
            case Rewind(names):
                log.info("rewind", run_id=self.run_id, averages=names)
                self._load(self._averages[name] for name in names)
            case Fold(seq, names):
                self._fold(self._entry(seq), [self._averages[name] for name in names])
            case Publish(names):
                for name in names:
                    self._publish(self._averages[name])
            case Assess(names):
                self._assessments.start([self._averages[name] for name in names], lineage=self._log.lineage)
            case Finish():
                self._finish()
            case Wait():
                pass

    def _publish(self, average: RunningAverage) -> None:
        with self._span("publish", average=average.name) as span:
            manifest = average.publish(attempt=self._log.attempt)
            span.note({"wa.generation": manifest.generation})
        telemetry.observe_lag("folded", self._log.lineage, step=manifest.last_step, now=self._clock.now())
        log.info("published", run_id=self.run_id, average=average.name, generation=manifest.generation)

    def _span(self, name: str, **about: str | int) -> AbstractContextManager[Span]:
        """A span in the trace of the run's submission."""
        attributes = {"wa.run_id": self.run_id} | {f"wa.{key}": value for key, value in about.items()}
        return tracing.span(name, parent=self._spec.traceparent, attributes=attributes)

    def _entry(self, seq: int) -> CheckpointCommitted:
        return next(entry for entry in self._log.lineage if entry.seq == seq)

    # -- folding ----------------------------------------------------------------------------------------------

    def _fold(self, entry: CheckpointCommitted, averages: list[RunningAverage]) -> None:
        """Read the checkpoint once, and only if some rule counts it, for all the averages that lack it."""
        counting = [average for average in averages if average.rule.counts(entry.step)]
        for average in averages:
            if average not in counting:
                average.skip(entry)
        if not counting:
            return
        if fault := self._verdict(entry):
            for average in counting:
                average.reject(entry, fault)
                telemetry.REJECTED.labels(fault.code).inc()
            return
        try:
            names = ",".join(average.name for average in counting)
            with (
                self._span("fold", step=entry.step, averages=names),
                telemetry.FOLD_SECONDS.time(),
                closing(self._open(entry)) as source,
            ):
                self._fold_source(entry, source, counting)
        except (CorruptError, IncompatibleError) as error:
            self._assessments.drop_copy()
            self._note_fault(entry, error, counting)
        except BaseException:
            self._assessments.drop_copy()  # it is not whole
            raise

    def _open(self, entry: CheckpointCommitted) -> FilesSource:
        is_newest = entry.seq == self._log.lineage[-1].seq
        # The newest will be measured beside the averages, most likely: kept, it is read from the store only once.
        copy = self._assessments.new_copy(entry) if is_newest else None
        return open_checkpoint(self._store, self.run_id, entry, copy=copy)

    def _fold_source(
        self, entry: CheckpointCommitted, source: FilesSource, counting: list[RunningAverage]
    ) -> None:
        misfits = [(average, error) for average in counting if (error := _misfit(average, entry, source))]
        if misfits:
            # A bit that flipped on the way looks like another shape: only the committed bytes can be blamed.
            fold_source(source, [], step=entry.step, verify=True, on_read=self._count_read)
        for average, error in misfits:
            average.reject(entry, error)
            telemetry.REJECTED.labels(error.code).inc()
        misfitting = [average for average, _ in misfits]
        sound = [average for average in counting if average not in misfitting]
        if sound:
            shadows = [average.shadow for average in sound if average.shadow is not None]
            fold_source(source, shadows, step=entry.step, verify=True, on_read=self._count_read)
        for average in sound:
            average.take(entry)
            telemetry.FOLDS.inc()
        self._faults.pop(entry.seq, None)

    def _count_read(self, num_bytes: int) -> None:
        telemetry.READ_BYTES.inc(num_bytes)
        self._on_progress()

    def _note_fault(
        self, entry: CheckpointCommitted, fault: CorruptError | IncompatibleError, counting: list[RunningAverage]
    ) -> None:
        """Remember it; the next step reads again, or rejects the checkpoint when that cannot help any more.

        What the read has touched goes back to its last generation, and what it has taken since is folded again.
        """
        self._faults.setdefault(entry.seq, []).append(fault)
        log.warning(
            "checkpoint_unsound", run_id=self.run_id, step=entry.step, code=fault.code, error=fault.message
        )
        # Of a shadow that holds nothing yet, names and shapes may have come from this very file.
        self._load(average for average in counting if average.is_broken or not average.manifest.folded)

    def _verdict(self, entry: CheckpointCommitted) -> CorruptError | IncompatibleError | None:
        """Why a checkpoint is to be rejected; a truncated or flipped transfer heals, a corrupt object does not."""
        faults = self._faults.get(entry.seq, [])
        is_final = len(faults) >= READS_BEFORE_REJECTION or any(fault.code in _FINAL for fault in faults)
        return faults[-1] if is_final else None

    # -- the end ----------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Say that the run is done, then forget it; a crash in between is mended by the next follower."""
        if self._log.state is RunState.FINALIZING:
            try:
                self._log.append(Succeeded(), expect={RunState.FINALIZING})
            except ConflictError:
                return  # another averager said so first, or the run moved on: read again
            log.info("succeeded", run_id=self.run_id)
        self._store.delete(layout.active_marker(self.run_id))
        self._log.refresh()
        wanted = requested_averages(self._spec, self._log.entries)
        if any(request.name not in self._averages for request in wanted):
            # It was added meanwhile: the marker that was taken away may be the one put down for it.
            mark_active(self._store, self.run_id, clock=self._clock)


def _misfit(
    average: RunningAverage, entry: CheckpointCommitted, source: FilesSource
) -> IncompatibleError | InvalidInputError | None:
    """Why a checkpoint cannot be in an average, by its step and its header; None if it can."""
    try:
        average.prepare(entry, source)
    except (IncompatibleError, InvalidInputError) as error:
        return error
    return None
