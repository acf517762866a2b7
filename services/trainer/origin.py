"""Where a run's next attempt grows from: the newest checkpoint that is sound, there, and no later than asked for.

The log says what is sound; that the files are there is looked up. A checkpoint that an attempt could not be grown
from is not tried a second time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.trainer.budget import attempts_told
from wa_core.catalog.checkpoints import sound_checkpoints
from wa_core.errors import ObjectNotFoundError
from wa_core.records import AttemptStarted, ResumeRequested

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wa_core.catalog.runs import RunLog
    from wa_core.records import CheckpointCommitted, LogEntry
    from wa_core.store.base import ObjectStore


def find_origin(store: ObjectStore, log: RunLog) -> int | None:
    """The log seq of the checkpoint to grow from, or None for the beginning.

    Raises:
        TransientError: the store is away.
    """
    found = (entry.seq for entry in candidates(log.run_id, log.entries, log.lineage) if _is_there(store, entry))
    return next(found, None)


def candidates(
    run_id: str, entries: Sequence[LogEntry], lineage: Sequence[CheckpointCommitted]
) -> list[CheckpointCommitted]:
    """The checkpoints that the log speaks for, newest first."""
    spoiled = {told.resumed_from for told in attempts_told(entries) if told.is_spoiled}
    until = _asked_for(entries)
    return [
        entry
        for entry in reversed(sound_checkpoints(run_id, lineage))
        if entry.seq not in spoiled and (until is None or entry.step <= until)
    ]


def _asked_for(entries: Sequence[LogEntry]) -> int | None:
    """The step that the run is to go back to, until an attempt has."""
    for entry in reversed(entries):
        if isinstance(entry, AttemptStarted):
            return None
        if isinstance(entry, ResumeRequested) and entry.from_step is not None:
            return entry.from_step
    return None


def _is_there(store: ObjectStore, entry: CheckpointCommitted) -> bool:
    try:
        for ref in entry.files.values():
            store.head(ref.key)
    except ObjectNotFoundError:
        return False
    return True
