"""Follows one run: asks the policy what is due, and does it, one action a step.

All it knows is in the bucket; it may be dropped at any moment and built again. Two followers of one run, in two
averagers, are safe: the loser of a generation is fenced and reads again.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from prometheus_client import Counter

from services.averager.assessor import AssessJob
from services.averager.average import RunningAverage
from services.averager.checkpoints import fetch_checkpoint
from wa_core import layout
from wa_core.averaging.policy import Assess, Finish, Fold, Publish, Rewind, RunView, Wait, next_action
from wa_core.catalog.runs import RunLog, fetch_spec
from wa_core.errors import ConflictError, CorruptError, FencedError
from wa_core.records import CheckpointCommitted, Heartbeat, RunState, Succeeded
from wa_core.tensors import serialize

if TYPE_CHECKING:
    import torch

    from services.averager.assessor import Assessor
    from wa_core.averaging.policy import Action
    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

HEARTBEAT_INTERVAL_S = 2.0
_FOLDS = Counter("wa_averager_folds", "Checkpoints folded into or set aside by an average.")
_FENCED = Counter("wa_averager_fenced", "Generations that another averager published first.")


class RunFollower:
    """Everything an averager does for one run."""

    def __init__(
        self,
        store: ObjectStore,
        run_id: str,
        *,
        clock: Clock,
        assessor: Assessor,
        publish_every_folds: int = 8,
        assess_interval_s: float = 5.0,
    ) -> None:
        self.run_id = run_id
        self.is_done = False
        self._store = store
        self._clock = clock
        self._assessor = assessor
        self._publish_every_folds = publish_every_folds
        self._assess_interval_s = assess_interval_s
        self._log = RunLog(store, run_id, clock=clock)
        self._spec = fetch_spec(store, run_id)
        requests = self._spec.request.averages
        self._averages = {r.name: RunningAverage(store, run_id, r, clock=clock) for r in requests}
        self._is_loaded = False
        self._assessed_at = -assess_interval_s
        self._is_assessing = False
        self._last_read: tuple[int, dict[str, torch.Tensor]] | None = None
        self._beat: tuple[str, float] = ("", float("-inf"))

    def step(self) -> bool:
        """Do the one thing that is due; returns whether there was any.

        Raises:
            TransientError: the store is away; what was in memory is sound, or will be read again.
        """
        self._log.refresh()
        if not self._is_loaded:
            self._load(self._averages)
            self._is_loaded = True
        try:
            has_assessed = self._is_assessing and self._publish_assessed()
            action = next_action(self._view(), publish_every_folds=self._publish_every_folds)
            self._heartbeat(type(action).__name__.lower())
            is_waiting = isinstance(action, Wait) or (isinstance(action, Assess) and not self._assessor.is_idle)
            self._act(action)
        except FencedError as error:
            _FENCED.inc()
            log.info("fenced", run_id=self.run_id, error=error.message)
            self._is_loaded = False
            return True
        return has_assessed or not is_waiting

    def _view(self) -> RunView:
        state = self._log.state
        return RunView(
            lineage=[entry.seq for entry in self._log.lineage],
            is_training_over=state.is_terminal or state is RunState.FINALIZING,
            is_assessment_due=self._clock.monotonic() - self._assessed_at >= self._assess_interval_s,
            averages=[average.view for average in self._averages.values()],
        )

    def _act(self, action: Action) -> None:
        match action:
            case Rewind(names):
                log.info("rewind", run_id=self.run_id, averages=names)
                self._load(names)
            case Fold(seq, names):
                self._fold(self._entry(seq), [self._averages[name] for name in names])
            case Publish(names):
                for name in names:
                    manifest = self._averages[name].publish()
                    log.info("published", run_id=self.run_id, average=name, generation=manifest.generation)
            case Assess(names) if self._assessor.is_idle:
                self._assess([self._averages[name] for name in names])
            case Finish():
                self._finish()
            case Assess() | Wait():
                pass

    def _load(self, names: tuple[str, ...] | dict[str, RunningAverage]) -> None:
        lineage = {entry.seq for entry in self._log.lineage}
        for name in names:
            self._averages[name].load(lineage)

    def _fold(self, entry: CheckpointCommitted, averages: list[RunningAverage]) -> None:
        """Read the checkpoint once, and only if some rule counts it, for all the averages that lack it."""
        tensors, fault = None, None
        if any(average.rule.counts(entry.step) for average in averages):
            try:
                tensors = self._read(entry)
            except CorruptError as error:
                fault = error
        for average in averages:
            if fault and average.rule.counts(entry.step):
                average.reject(entry, fault)
            else:
                average.take(entry, tensors)
            _FOLDS.inc()

    def _read(self, entry: CheckpointCommitted) -> dict[str, torch.Tensor]:
        """A checkpoint's tensors; the last one read is kept, since assessing wants it again."""
        if self._last_read is None or self._last_read[0] != entry.seq:
            self._last_read = (entry.seq, fetch_checkpoint(self._store, entry).tensors)
        return self._last_read[1]

    def _entry(self, seq: int) -> CheckpointCommitted:
        return next(entry for entry in self._log.lineage if entry.seq == seq)

    def _assess(self, averages: list[RunningAverage]) -> None:
        newest = self._log.lineage[-1]
        folder = Path(tempfile.mkdtemp(prefix="wa-assess-"))
        job = AssessJob(
            run_id=self.run_id,
            request=self._spec.request,
            folder=folder,
            raw_step=newest.step,
            averages={average.name: average.manifest for average in averages},
            checkpoints={entry.step: entry.files[layout.MODEL_FILE].sha256 for entry in self._log.lineage},
        )
        try:
            job.raw_path.write_bytes(serialize(self._read(newest)))
        except CorruptError:
            # It was rejected when it was folded; the averages are measured all the same.
            job = replace(job, raw_step=None)
        for average in averages:
            job.value_path(average.name).write_bytes(serialize(average.value()))
        self._assessor.start(job)
        self._is_assessing = True

    def _publish_assessed(self) -> bool:
        """Commit what assessing has found out, if it has ended; whether it has."""
        finished = self._assessor.poll()
        if finished is None:
            return False
        self._is_assessing = False
        self._assessed_at = self._clock.monotonic()
        try:
            for assessed in finished.assessed:
                name, generation = assessed.manifest.name, assessed.manifest.generation
                self._averages[name].publish_assessed(assessed)
                log.info("assessed", run_id=self.run_id, average=name, generation=generation)
        finally:
            shutil.rmtree(finished.folder, ignore_errors=True)
        return True

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

    def _heartbeat(self, doing: str) -> None:
        """Advisory: what is being done, on every change and every few seconds."""
        said, at = self._beat
        now = self._clock.monotonic()
        if doing == said and now - at < HEARTBEAT_INTERVAL_S:
            return
        self._beat = (doing, now)
        beat = Heartbeat(who="averager", at=self._clock.now(), attempt=self._log.attempt, detail=doing)
        self._store.put(layout.heartbeat(self.run_id, "averager"), beat.model_dump_json().encode())
