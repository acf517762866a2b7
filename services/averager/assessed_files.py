"""Writes the files to serve of a job that the assess process is done with, and what its assessments say.

It knows findings and the job's folder; no process and no bucket. The invariant: an outcome has only averages whose
files are whole.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import structlog

from services.averager.assess_job import Assessed, FinishedJob
from services.averager.protocol import AverageFound, buffers_path
from services.averager.publication import Buffers, ServedWeights, provenance
from wa_core import layout
from wa_core.averaging.files.sources import open_source
from wa_core.errors import WeightAveragingError
from wa_core.records import Assessment, BatchNormSummary, Evaluation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.averager.hearing import Hearing
    from wa_core.records import AverageManifest

log = structlog.get_logger(__name__)


class _Stopped(Exception):  # noqa: N818  no error: somebody wants the end
    """Writing was given up."""


class AssessedFiles:
    """Writes the files to serve, in a thread: large models take long, and the averager has other things to do."""

    def __init__(self, hearing: Hearing, *, took_s: float) -> None:
        self.outcome: FinishedJob | None = None
        self._hearing = hearing
        self._took_s = took_s
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="assessed-files", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give up, within a block of bytes."""
        self._is_stopping.set()
        self._thread.join()

    def _run(self) -> None:
        job = self._hearing.job
        assessed = []
        for name, manifest in job.averages.items():
            try:
                assessed.append(self._write(manifest, self._hearing.of(name)))
            except _Stopped:
                return
            except (WeightAveragingError, OSError) as error:
                log.warning("assessed_files_not_written", run_id=job.run_id, average=name, error=str(error))
            except Exception:  # the thread's outermost loop: without an outcome nothing would be assessed again
                log.exception("assessed_files_not_written", run_id=job.run_id, average=name)
        self.outcome = FinishedJob(job.run_id, tuple(assessed), job.folder)

    def _write(self, manifest: AverageManifest, found: AverageFound) -> Assessed:
        job, name = self._hearing.job, manifest.name
        value = open_source(job.value_path(name))
        try:
            buffers = Buffers.read(buffers_path(job.folder, name), value) if found.has_buffers else Buffers({})
            if isinstance(buffers, str):
                refused = BatchNormSummary(status="failed", code="assess_failed", message=buffers)
                found, buffers = AverageFound(name=name, before=found.before, batchnorm=refused), Buffers({})
            files = {file: job.folder / f"{name}.{file}" for file in (layout.MODEL_FILE, layout.PICKLE_FILE)}
            served = ServedWeights(value, buffers)
            metadata = provenance(manifest, found.batchnorm, checkpoints=job.checkpoints)
            served.write_safetensors(files[layout.MODEL_FILE], metadata=metadata, on_block=self._go_on)
            served.write_archive(files[layout.PICKLE_FILE], on_block=self._go_on)
        finally:
            value.close()
        job.value_path(name).unlink()  # scratch space is as scarce as models are large
        return Assessed(manifest, self._assessment(manifest, found), files)

    def _assessment(self, manifest: AverageManifest, found: AverageFound) -> Assessment:
        raw, raw_step, step = self._hearing.raw, self._hearing.job.raw_step, manifest.last_step or 0
        return Assessment(
            raw=_evaluation(raw_step, raw.metrics if raw else None),
            averaged=_evaluation(step, found.after),
            before_recalibration=_evaluation(step, found.before),
            batchnorm=found.batchnorm,
            comparison=found.comparison,
            data_sha256=raw.data_sha256 if raw else None,
            layers=found.layers,
            took_s=self._took_s,
            where=self._hearing.where,
        )

    def _go_on(self) -> None:
        if self._is_stopping.is_set():
            raise _Stopped


def _evaluation(step: int | None, metrics: Mapping[str, float] | None) -> Evaluation | None:
    return None if step is None or metrics is None else Evaluation(step=step, metrics=dict(metrics))
