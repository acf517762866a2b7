"""Follows one run: asks the policy what is due, and does it, one action a step.

All it knows is in the bucket; it may be dropped at any moment and built again. Two followers of one run, in two
averagers, are safe: the loser of a generation is fenced and reads again.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from services.averager import telemetry
from services.averager.assessor import AssessJob
from services.averager.average import RunningAverage
from services.averager.checkpoints import Copy, open_checkpoint
from wa_core import layout
from wa_core.averaging.policy import Assess, Finish, Fold, Publish, Rewind, RunView, Wait, next_action
from wa_core.averaging.streaming import fold_source
from wa_core.catalog.averages import Generations
from wa_core.catalog.files import put_path
from wa_core.catalog.runs import RunLog, fetch_spec, requested_averages
from wa_core.errors import ConflictError, CorruptError, FencedError, IncompatibleError, InvalidInputError
from wa_core.records import AssessmentRecord, CheckpointCommitted, RunState, Succeeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from services.averager.assessor import Assessed, Assessor, FinishedJob
    from services.averager.scratch import Scratch
    from wa_core.averaging.files.sources import FilesSource
    from wa_core.averaging.policy import Action
    from wa_core.clock import Clock
    from wa_core.records import FileRef
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

READS_BEFORE_REJECTION = 3
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
        self.is_done = False
        self.doing = "reading"
        self._store = store
        self._clock = clock
        self._assessor = assessor
        self._scratch = scratch
        self._on_progress = on_progress
        self._publish_every_folds = publish_every_folds
        self._assess_interval_s = assess_interval_s
        self._log = RunLog(store, run_id, clock=clock)
        self._spec = fetch_spec(store, run_id)
        self._averages: dict[str, RunningAverage] = {}
        self._assessed_at = -assess_interval_s
        self._assessing = frozenset[str]()
        self._finished: FinishedJob | None = None
        self._faults: dict[int, list[CorruptError | IncompatibleError]] = {}
        self._copy: tuple[int, Copy] | None = None

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
        if self._finished is not None:
            self._record(self._finished)
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
        self._assessing = frozenset()
        self._finished = finished

    def close(self) -> None:
        """Give memory and scratch space back."""
        for average in self._averages.values():
            average.close()
        self._drop_copy()
        if self._finished is not None:
            shutil.rmtree(self._finished.folder, ignore_errors=True)

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

    def _load(self, averages: Iterable[RunningAverage]) -> None:
        for average in averages:
            average.look()
            # After the look: a log that is older than a generation would make it seem to be of another branch.
            self._log.refresh()
            average.load({entry.seq: entry for entry in self._log.lineage})

    def _view(self) -> RunView:
        state = self._log.state
        is_due = self._clock.monotonic() - self._assessed_at >= self._assess_interval_s
        return RunView(
            lineage=[entry.seq for entry in self._log.lineage],
            is_training_over=state.is_terminal or state is RunState.FINALIZING,
            is_assessment_due=is_due,
            is_assessor_idle=self._assessor.is_idle,
            averages=[average.view for average in self._averages.values()],
            assessing=self._assessing,
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
                    manifest = self._averages[name].publish(attempt=self._log.attempt)
                    log.info("published", run_id=self.run_id, average=name, generation=manifest.generation)
            case Assess(names):
                self._assess([self._averages[name] for name in names])
            case Finish():
                self._finish()
            case Wait():
                pass

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
                telemetry.REJECTED.inc()
            return
        try:
            with telemetry.FOLD_SECONDS.time(), closing(self._open(entry)) as source:
                self._fold_source(entry, source, counting)
        except (CorruptError, IncompatibleError) as error:
            self._drop_copy()
            self._note_fault(entry, error, counting)
        except BaseException:
            self._drop_copy()  # it is not whole
            raise

    def _open(self, entry: CheckpointCommitted) -> FilesSource:
        self._drop_copy()
        is_newest = entry.seq == self._log.lineage[-1].seq
        if not is_newest:
            return open_checkpoint(self._store, self.run_id, entry)
        # It will be measured beside the averages, most likely: kept, it is read from the store only once.
        copy = Copy(self._scratch.folder / f"{self.run_id}-{entry.seq}.safetensors")
        self._copy = entry.seq, copy
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
            telemetry.REJECTED.inc()
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

    # -- assessing --------------------------------------------------------------------------------------------

    def _assess(self, averages: list[RunningAverage]) -> None:
        """Give the newest generations to the assessor, which works beside this process."""
        folder = self._scratch.new_folder("assess-")
        newest = self._log.lineage[-1]
        try:
            job = AssessJob(
                run_id=self.run_id,
                request=self._spec.request,
                folder=folder,
                raw_step=newest.step,
                averages={average.name: average.manifest for average in averages},
                checkpoints=_digests(self._log.lineage),
            )
            for average in averages:
                average.write_value(job.value_path(average.name))
            self._assessor.start(job if self._put_raw(job.raw_path, newest) else replace(job, raw_step=None))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._assessed_at = self._clock.monotonic()
        self._assessing = frozenset(average.name for average in averages)

    def _put_raw(self, path: Path, newest: CheckpointCommitted) -> bool:
        """Put the newest checkpoint beside the averages; False when it cannot be read."""
        if self._copy is not None and self._copy[0] == newest.seq and self._copy[1].is_sound:
            self._copy[1].path.rename(path)
            self._copy = None
            return True
        copy = Copy(path)
        try:
            with closing(open_checkpoint(self._store, self.run_id, newest, copy=copy)) as source:
                fold_source(source, [], step=newest.step, verify=True, on_read=self._count_read)
        except (CorruptError, IncompatibleError):
            copy.remove()
            return False  # it was rejected when it was folded; the averages are measured all the same
        return copy.is_sound

    def _record(self, finished: FinishedJob) -> None:
        for assessed in finished.assessed:
            self._record_one(assessed)
        self._finished = None
        shutil.rmtree(finished.folder, ignore_errors=True)

    def _record_one(self, assessed: Assessed) -> None:
        manifest = assessed.manifest
        generations = Generations(self._store, self.run_id, manifest.name)
        record = AssessmentRecord(
            run_id=self.run_id,
            name=manifest.name,
            generation=manifest.generation,
            at=self._clock.now(),
            files={name: self._upload(manifest.name, name, path) for name, path in assessed.files.items()},
            assessment=assessed.assessment,
            best=generations.best_with(manifest.generation, assessed.assessment),
        )
        try:
            # The files are up before this: a crash in between leaves orphans, never a dangling pointer.
            generations.commit_assessment(record)
        except FencedError:
            for ref in record.files.values():  # another averager was first; its files are named, these are not
                self._store.delete(ref.key)
        self._averages[manifest.name].mark_assessed(manifest.generation)
        telemetry.ASSESS_SECONDS.observe(assessed.assessment.took_s)
        log.info("assessed", run_id=self.run_id, average=manifest.name, generation=manifest.generation)

    def _upload(self, average: str, file: str, path: Path) -> FileRef:
        key = layout.blob(self.run_id, average, nonce=layout.new_nonce(), file=file)
        ref = put_path(self._store, key, path, on_read=self._on_progress)
        telemetry.WRITTEN_BYTES.inc(ref.size_bytes)
        return ref

    def _drop_copy(self) -> None:
        if self._copy is not None:
            self._copy[1].remove()
            self._copy = None

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
        self.is_done = True


def _misfit(
    average: RunningAverage, entry: CheckpointCommitted, source: FilesSource
) -> IncompatibleError | InvalidInputError | None:
    """Why a checkpoint cannot be in an average, by its step and its header; None if it can."""
    try:
        average.prepare(entry, source)
    except (IncompatibleError, InvalidInputError) as error:
        return error
    return None


def _digests(checkpoints: Sequence[CheckpointCommitted]) -> dict[int, str]:
    """Step -> SHA-256 of the weights."""
    return {
        entry.step: entry.files[layout.MODEL_FILE].sha256
        for entry in checkpoints
        if layout.MODEL_FILE in entry.files
    }
