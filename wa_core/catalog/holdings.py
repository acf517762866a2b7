"""Reads from the bucket what there is of a run that an average could be made from.

It knows the store and the records; the judgement is that of `wa_core.catalog.catch_up`. What is listed was there
at that moment: whoever reads it later may find it gone, and should look again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.catalog.checkpoints import find_faults
from wa_core.catalog.history import lineage
from wa_core.catalog.rebuild import Holdings
from wa_core.catalog.runs import requested_averages
from wa_core.errors import CorruptError
from wa_core.records import SetAside

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from wa_core.records import AverageManifest, LogEntry, RunSpec
    from wa_core.store.base import ObjectStore

#: Of one average, so many generations are read at most; retention leaves far fewer states.
MAX_GENERATIONS_READ = 512
# That a file was gone says nothing against the checkpoint: whether it is there is seen in the listing.
_GONE = "object_missing"


def fetch_holdings(store: ObjectStore, spec: RunSpec, entries: Sequence[LogEntry]) -> Holdings:
    """What there is of a run.

    Args:
        store: the bucket.
        spec: the run.
        entries: its log.

    Raises:
        TransientError: the store is away.
    """
    checkpoints = lineage(entries)
    steps = {entry.seq: entry.step for entry in checkpoints}
    unsound = {
        seq: SetAside(seq=seq, step=steps[seq], code=fault.code, message=fault.message)
        for seq, fault in find_faults(spec.run_id, checkpoints).items()
    }
    states: list[AverageManifest] = []
    for average in requested_averages(spec, entries):
        listed = (info.key for info in store.list(layout.blobs_prefix(spec.run_id, average.name)))
        kept = {key for key in listed if key.endswith(f"/{layout.SHADOW_FILE}")}
        for manifest in _newest_first(Generations(store, spec.run_id, average.name)):
            unsound |= {aside.seq: aside for aside in manifest.rejected if aside.code != _GONE}
            if manifest.shadow is not None and manifest.shadow.key in kept:
                kept.remove(manifest.shadow.key)
                states.append(manifest)
            if not kept:
                break
    present = {info.key for info in store.list(layout.checkpoints_prefix(spec.run_id))}
    return Holdings(checkpoints, unsound, frozenset(present), states)


def _newest_first(generations: Generations) -> Iterator[AverageManifest]:
    """The newest generations that can be read."""
    for number in list(reversed(generations.numbers()))[:MAX_GENERATIONS_READ]:
        try:
            yield generations.fetch(number)
        except CorruptError:
            continue  # what it names is not used
