"""The assessing of one run, as its follower sees it: jobs given to the assessor, and what came of them committed.

It knows averages, the assessor and the bucket; not when assessing is due beside other work, which is the policy's
to say. The invariant: an assessment is committed once per generation, after its files; whatever goes wrong with
one costs no fold.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from services.averager import telemetry
from services.averager.assess_job import AssessJob
from services.averager.checkpoints import Copy, open_checkpoint
from services.runtime import tracing
from wa_core import layout
from wa_core.averaging.streaming import fold_source
from wa_core.catalog.averages import Generations
from wa_core.catalog.files import put_path
from wa_core.catalog.packages import unpack_package
from wa_core.errors import CorruptError, FencedError, IncompatibleError, InvalidInputError
from wa_core.records import AssessmentRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from services.averager.assess_job import Assessed, FinishedJob
    from services.averager.assessor import Assessor
    from services.averager.average import RunningAverage
    from services.averager.scratch import Scratch
    from wa_core.clock import Clock
    from wa_core.records import CheckpointCommitted, FileRef, RunSpec
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)


class Assessments:
    """The assessments of one run.

    Args:
        store: the bucket.
        spec: the run.
        clock: the time source.
        assessor: measures weights, one job at a time, whichever run's.
        scratch: working space.
        on_progress: called from time to time in the middle of long work; what it raises ends that work.
        interval_s: while training goes on, assessing starts at most so often.
    """

    def __init__(
        self,
        store: ObjectStore,
        spec: RunSpec,
        *,
        clock: Clock,
        assessor: Assessor,
        scratch: Scratch,
        on_progress: Callable[[], None],
        interval_s: float,
    ) -> None:
        self.under_way = frozenset[str]()
        self._store = store
        self._spec = spec
        self._clock = clock
        self._assessor = assessor
        self._scratch = scratch
        self._on_progress = on_progress
        self._interval_s = interval_s
        self._started_at = clock.monotonic() - interval_s
        self._finished: FinishedJob | None = None
        self._copy: tuple[int, Copy] | None = None
        self._about = {"wa.run_id": spec.run_id}
        self._span = tracing.NO_SPAN
        self._code: Path | None = None

    @property
    def is_due(self) -> bool:
        """Whether enough time has gone by since the last job began."""
        return self._clock.monotonic() - self._started_at >= self._interval_s

    @property
    def is_possible(self) -> bool:
        """Whether the assessor can take a job."""
        return self._assessor.is_idle

    def new_copy(self, entry: CheckpointCommitted) -> Copy:
        """Where to keep the bytes of the newest checkpoint while they are folded, to be measured later."""
        self.drop_copy()
        copy = Copy(self._scratch.folder / f"{self._spec.run_id}-{entry.seq}.safetensors")
        self._copy = entry.seq, copy
        return copy

    def drop_copy(self) -> None:
        """Forget the copy."""
        if self._copy is not None:
            self._copy[1].remove()
            self._copy = None

    def start(self, averages: Sequence[RunningAverage], *, lineage: Sequence[CheckpointCommitted]) -> None:
        """Give the newest generations to the assessor, which works beside this process.

        Raises:
            TransientError: the store is away.
        """
        folder, newest = self._scratch.new_folder("assess-"), lineage[-1]
        try:
            job = AssessJob(
                run_id=self._spec.run_id,
                request=self._spec.request,
                folder=folder,
                raw_step=newest.step,
                averages={average.name: average.manifest for average in averages},
                checkpoints=_digests(lineage),
                code=self._unpacked_code(),
            )
            for average in averages:
                average.write_value(job.value_path(average.name))
            self._assessor.start(job if self._put_raw(job.raw_path, newest) else replace(job, raw_step=None))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._span = tracing.begin("assess", parent=self._spec.traceparent, attributes=self._about)
        self._started_at = self._clock.monotonic()
        self.under_way = frozenset(average.name for average in averages)

    def take(self, finished: FinishedJob) -> None:
        """A job has ended; what came of it is committed by `record`."""
        self.under_way = frozenset()
        self._span.end()
        self._finished = finished

    def record(
        self, averages: Mapping[str, RunningAverage], *, lineage: Sequence[CheckpointCommitted] = ()
    ) -> bool:
        """Commit what came of the last job; whether there was any.

        Raises:
            TransientError: the store is away; call it again.
        """
        if self._finished is None:
            return False
        for assessed in self._finished.assessed:
            with tracing.span("serve", parent=self._spec.traceparent, attributes=self._about):
                self._record_one(assessed)
            averages[assessed.manifest.name].mark_assessed(assessed.manifest.generation)
            telemetry.observe_lag("served", lineage, step=assessed.manifest.last_step, now=self._clock.now())
        shutil.rmtree(self._finished.folder, ignore_errors=True)
        self._finished = None
        return True

    def close(self) -> None:
        """Give scratch space back."""
        self.drop_copy()
        for folder in (self._code, self._finished.folder if self._finished else None):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def _unpacked_code(self) -> Path | None:
        """Where the run's package is unpacked; None without one."""
        package = self._spec.request.package
        if package is None:
            return None
        folder = self._scratch.folder / f"{self._spec.run_id}-code"
        if self._code is None:
            try:
                self._code = unpack_package(self._store, package, folder)
            except (InvalidInputError, CorruptError) as error:
                # The assess process will say that there is no such module.
                log.warning("package_unusable", run_id=self._spec.run_id, package=package, error=error.message)
        return folder

    def _put_raw(self, path: Path, newest: CheckpointCommitted) -> bool:
        """Put the newest checkpoint beside the averages; False when it cannot be read."""
        if self._copy is not None and self._copy[0] == newest.seq and self._copy[1].is_sound:
            self._copy[1].path.rename(path)
            self._copy = None
            return True
        copy = Copy(path)
        try:
            with closing(open_checkpoint(self._store, self._spec.run_id, newest, copy=copy)) as source:
                fold_source(source, [], step=newest.step, verify=True, on_read=self._count_read)
        except (CorruptError, IncompatibleError):
            copy.remove()
            return False  # it was rejected when it was folded; the averages are measured all the same
        return copy.is_sound

    def _count_read(self, num_bytes: int) -> None:
        telemetry.READ_BYTES.inc(num_bytes)
        self._on_progress()

    def _record_one(self, assessed: Assessed) -> None:
        manifest = assessed.manifest
        generations = Generations(self._store, manifest.run_id, manifest.name)
        record = AssessmentRecord(
            run_id=manifest.run_id,
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
        telemetry.ASSESS_SECONDS.observe(assessed.assessment.took_s)
        log.info("assessed", run_id=manifest.run_id, average=manifest.name, generation=manifest.generation)

    def _upload(self, average: str, file: str, path: Path) -> FileRef:
        key = layout.blob(self._spec.run_id, average, nonce=layout.new_nonce(), file=file)
        ref = put_path(self._store, key, path, on_read=self._on_progress)
        telemetry.WRITTEN_BYTES.inc(ref.size_bytes)
        return ref


def _digests(checkpoints: Sequence[CheckpointCommitted]) -> dict[int, str]:
    """Step -> SHA-256 of the weights."""
    return {
        entry.step: entry.files[layout.MODEL_FILE].sha256
        for entry in checkpoints
        if layout.MODEL_FILE in entry.files
    }
