"""Entries and runs for tests of the catalog."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wa_core.catalog.runs import RunLog, submit
from wa_core.clock import ManualClock
from wa_core.records import CheckpointCommitted, RunRequest

if TYPE_CHECKING:
    from wa_core.store.base import ObjectStore

RECIPE = "services.recipes.digits:Digits"
DIGEST = "0" * 64


def checkpoint(step: int) -> CheckpointCommitted:
    """A checkpoint without files."""
    return CheckpointCommitted(step=step, files={}, spec_digest=DIGEST)


def submitted(store: ObjectStore) -> str:
    """The id of a run that has just been submitted."""
    return submit(store, RunRequest(recipe=RECIPE), clock=ManualClock()).run_id


def open_log(store: ObjectStore, run_id: str, *, patience_s: float = 10.0) -> RunLog:
    """A log that has read nothing yet, as a process that just started has it."""
    return RunLog(store, run_id, clock=ManualClock(), patience_s=patience_s)
