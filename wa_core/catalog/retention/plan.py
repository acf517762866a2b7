"""Decides for every object of a run whether it is kept or may go, and why. Pure.

The invariants:

- Whatever the newest generation of an average names is kept, and so is the newest surviving checkpoint.
- What may go, may go in every later state of the run: nothing that is decided later relies on it. So a sweeper may
  be slow, may die half-way, and may run beside another one (ADR 11).
- Only files of checkpoints and of averages ever go. Records are the proof, and stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.catalog.retention.blobs import AverageBlobs
from wa_core.catalog.retention.checkpoints import Checkpoints
from wa_core.catalog.retention.picture import Delete, Grace, Keep

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from wa_core.catalog.retention.picture import AveragePicture, RunPicture, Verdict
    from wa_core.store.base import ObjectInfo


def plan(
    run: RunPicture, objects: Sequence[ObjectInfo], *, now: datetime, grace: Grace | None = None
) -> dict[str, Verdict]:
    """The verdict on each of `objects`, by key.

    Args:
        run: what the run's records say.
        objects: what is in the bucket of it; all files of its checkpoints and averages must be among them.
        now: the store's own time, which the objects' times are compared with.
        grace: how long things are left alone.
    """
    grace = grace or Grace()
    ages = {info.key: (now - (info.modified_at or now)).total_seconds() for info in objects}
    checkpoints = Checkpoints(run, ages, grace=grace)
    blobs = {
        average.name: AverageBlobs(
            average,
            checkpoints.path,
            ages,
            every_steps=run.policy.keep_every_steps,
            beginner=next((other.name for other in run.averages if not other.generations), None),
            grace=grace,
        )
        for average in run.averages
    }
    named = checkpoints.verdicts(blobs.values())
    for found in blobs.values():
        _merge(named, found.verdicts())
    orphans = _Orphans(checkpoints, run.averages, grace=grace)
    return {key: named.get(key) or orphans.verdict(key, age_s=age) for key, age in ages.items()}


def _merge(verdicts: dict[str, Verdict], more: Mapping[str, Verdict]) -> None:
    """A file that two records name stays for as long as one of them needs it."""
    for key, verdict in more.items():
        if not isinstance(verdicts.get(key), Keep):
            verdicts[key] = verdict


class _Orphans:
    """Judges what no record names."""

    def __init__(self, checkpoints: Checkpoints, averages: Iterable[AveragePicture], *, grace: Grace) -> None:
        self._checkpoints = checkpoints
        self._averages = {average.name: average for average in averages}
        self._grace_s = grace.orphan_s

    def verdict(self, key: str, *, age_s: float) -> Verdict:
        """Keep what is not a file of a checkpoint or an average, and what may be on its way."""
        name, checkpoint = (layout.blob_of(key) or (None,))[0], layout.checkpoint_of(key)
        if name is None and checkpoint is None:
            return Keep("a record, a log or a sign of life; they are never deleted")
        if name is not None and name not in self._averages:
            return Keep("no average of the run has this name")
        if name is not None and not self._averages[name].is_complete:
            return Keep("not looked up yet", is_temporary=True)
        if checkpoint is not None and self._checkpoints.is_unreadable(*checkpoint):
            return Keep("a log entry that this version cannot read may name it")
        age = f"{age_s / 3600:.1f} h old"
        if age_s < self._grace_s:
            return Keep(f"no record names it yet; one may be on its way, it is {age}", is_temporary=True)
        return Delete(f"no record names it, and it is {age}")
