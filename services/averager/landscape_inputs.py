"""Puts what a landscape goes through into a folder: verified weights from the bucket, and the job that names them.

It knows records, the bucket and files; no process. The invariant: a file is there only if its bytes are what its
record says. Which checkpoints are gone is seen here, so a landscape goes through what is kept.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.averager import telemetry
from services.averager.landscape_protocol import LandscapeJobFile, landscape_job_path, weights_path
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.catalog.checkpoints import checkpoint_file, sound_checkpoints
from wa_core.catalog.packages import unpack_package
from wa_core.catalog.runs import RunLog, fetch_spec
from wa_core.errors import CorruptError, NoAverageYetError, NotFoundError, ObjectNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from wa_core.clock import Clock
    from wa_core.records import AverageManifest, CheckpointCommitted, FileRef, LandscapeRecord, RunSpec
    from wa_core.store.base import ObjectStore


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is in the folder: the generation, and label and step of each of the weights, in order."""

    generation: int
    labels: tuple[tuple[str, int], ...]


def fetch_inputs(
    store: ObjectStore,
    record: LandscapeRecord,
    folder: Path,
    *,
    max_samples: int,
    clock: Clock,
    on_read: Callable[[], None],
) -> Inputs:
    """Fetch the weights of the newest published generation, and of checkpoints that go with it.

    Args:
        store: the bucket.
        record: what is wanted.
        folder: where to.
        max_samples: of held-out and of calibration data, each.
        clock: the time source.
        on_read: called from time to time; what it raises ends the work.

    Raises:
        NotFoundError: no checkpoint to go with it is kept (`checkpoint_not_kept`).
        NoAverageYetError: nothing is published.
        CorruptError: what was read is not what its record says.
        TransientError: the store is away.
        OSError: the disk has no room.
    """
    spec = fetch_spec(store, record.run_id)
    generations = Generations(store, record.run_id, record.name)
    served = generations.newest_assessment()
    if served is None:
        raise NoAverageYetError(f"average {record.name!r} has no published weights yet")
    manifest = generations.fetch(served.generation)
    chosen = _checkpoints(store, record, manifest, clock=clock)
    files = [checkpoint_file(record.run_id, entry) for _, entry in chosen] + [served.files[layout.MODEL_FILE]]
    for number, ref in enumerate(files):
        _fetch(store, ref, weights_path(folder, number), on_read=on_read)
    _write_job(store, spec, record, folder, max_samples=max_samples)
    labels = [(label, entry.step) for label, entry in chosen]
    return Inputs(served.generation, (*labels, ("average", manifest.last_step or 0)))


def _checkpoints(
    store: ObjectStore, record: LandscapeRecord, manifest: AverageManifest, *, clock: Clock
) -> list[tuple[str, CheckpointCommitted]]:
    """The newest raw weights that the generation has seen; of a plane before that the oldest ones in it."""
    log = RunLog(store, record.run_id, clock=clock)
    log.refresh()
    present = {info.key for info in store.list(layout.checkpoints_prefix(record.run_id))}
    kept = [
        entry
        for entry in sound_checkpoints(record.run_id, log.lineage)
        if checkpoint_file(record.run_id, entry).key in present
    ]
    if not kept:
        raise _not_kept("no checkpoint of the run")
    newest = next((entry for entry in reversed(kept) if entry.seq <= manifest.cursor), kept[-1])
    if record.kind == "line":
        return [("raw", newest)]
    inside = set(manifest.folded)
    oldest = next((entry for entry in kept if entry.seq in inside and entry.seq != newest.seq), None)
    if oldest is None:
        raise _not_kept("no checkpoint in the average but the newest")
    return [("first", oldest), ("raw", newest)]


def _not_kept(what: str) -> NotFoundError:
    return NotFoundError(
        f"{what} is kept, so there is nothing to go through; keep more (checkpoint.keep_last), or ask for a line",
        code="checkpoint_not_kept",
    )


def _fetch(store: ObjectStore, ref: FileRef, path: Path, *, on_read: Callable[[], None]) -> None:
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file:
            for chunk in store.stream(ref.key):
                digest.update(chunk)
                file.write(chunk)
                telemetry.READ_BYTES.inc(len(chunk))
                on_read()
    except ObjectNotFoundError:
        raise CorruptError(f"{ref.key} is recorded but absent from the bucket", code="object_missing") from None
    if digest.hexdigest() != ref.sha256:
        raise CorruptError(f"{ref.key}: the bytes are not those of its record; ask again", code="digest_mismatch")


def _write_job(
    store: ObjectStore, spec: RunSpec, record: LandscapeRecord, folder: Path, *, max_samples: int
) -> None:
    package = spec.request.package
    code = unpack_package(store, package, folder / "code") if package else None
    job = LandscapeJobFile(
        recipe=spec.request.recipe,
        code=str(code) if code else None,
        config=spec.request.config,
        seed=spec.request.seed,
        kind=record.kind,
        points=record.points,
        max_samples=max_samples,
    )
    landscape_job_path(folder).write_text(job.model_dump_json())
