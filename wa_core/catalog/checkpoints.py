"""What a run's log alone says against a checkpoint, before a byte of it is read.

A checkpoint with a fault is set aside as `rejected`, and the others are folded; so a fault is a value here, not
the end of the log. It knows records and keys; no store and no tensors. The invariant: what `checkpoint_file`
returns lies in its own run's checkpoints, so no record can make anybody read elsewhere.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pydantic import Field

from wa_core import layout
from wa_core.catalog.commit import parse
from wa_core.errors import CorruptError, InvalidInputError
from wa_core.records import CheckpointCommitted, Entry, FileRef, Sha256, entry_adapter

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_BELIEVED = {"seq", "attempt", "state", "step"}


class UnreadableCheckpoint(CheckpointCommitted):
    """Stands, in memory, for a checkpoint's log entry that this version cannot read; `problem` says why.

    Only where it is in the log is believed: seq, attempt, state and step. It is never written.
    """

    files: dict[str, FileRef] = Field(default_factory=dict)
    spec_digest: Sha256 = "0" * 64
    problem: str


def parse_entry(body: bytes, *, key: str) -> Entry:
    """Read a log entry. A checkpoint's that cannot be read becomes an `UnreadableCheckpoint`.

    Of other kinds the run's state depends on what they say, so nothing is guessed about them.

    Raises:
        CorruptError: it is no log entry, or one that this version does not know (`record_unreadable`).
    """
    try:
        return parse(entry_adapter.validate_json, body, key=key)
    except CorruptError as error:
        if (outline := _outline(body, problem=error.message)) is None:
            raise
        return outline


def checkpoint_file(run_id: str, entry: CheckpointCommitted, name: str = layout.MODEL_FILE) -> FileRef:
    """The file of a checkpoint that holds its weights, or the one of another name.

    Raises:
        CorruptError: the entry cannot be read (`record_unreadable`), lists no such file (`object_missing`), or
            points to one that is not in the checkpoints of this run (`foreign_key`).
    """
    if isinstance(entry, UnreadableCheckpoint):
        raise CorruptError(entry.problem, code="record_unreadable")
    ref = entry.files.get(name)
    if ref is None:
        raise CorruptError(
            f"the checkpoint of step {entry.step} (log entry {entry.seq}) lists no {name}; it holds "
            f"{', '.join(sorted(entry.files)) or 'nothing'}",
            code="object_missing",
        )
    if not layout.is_checkpoint_file(run_id, ref.key):
        raise CorruptError(
            f"the checkpoint of step {entry.step} points to {ref.key[:200]!a}, which is no file of a checkpoint "
            f"of run {run_id}; it was not read; publish the checkpoint into its own run",
            code="foreign_key",
        )
    return ref


def find_faults(
    run_id: str, checkpoints: Iterable[CheckpointCommitted]
) -> dict[int, CorruptError | InvalidInputError]:
    """What is wrong with checkpoints by their records alone: log seq -> why it must be rejected.

    Args:
        run_id: their run.
        checkpoints: its lineage, in log order.

    Returns:
        Errors as `checkpoint_file` raises them, and `step_backwards`: a step must be larger than any before it on
        the path, or averages would depend on which of two checkpoints is meant.
    """
    faults: dict[int, CorruptError | InvalidInputError] = {}
    newest = -1
    for entry in checkpoints:
        try:
            checkpoint_file(run_id, entry)
        except CorruptError as error:
            faults[entry.seq] = error
            continue
        if entry.step <= newest:
            faults[entry.seq] = InvalidInputError(
                f"step {entry.step} comes after step {newest} in the log; give each step once, in ascending order",
                code="step_backwards",
            )
        newest = max(newest, entry.step)
    return faults


def sound_checkpoints(run_id: str, checkpoints: Sequence[CheckpointCommitted]) -> list[CheckpointCommitted]:
    """Those of a lineage without faults: what no average folds, no attempt grows from."""
    faults = find_faults(run_id, checkpoints)
    return [entry for entry in checkpoints if entry.seq not in faults]


def _outline(body: bytes, *, problem: str) -> UnreadableCheckpoint | None:
    try:
        found = json.loads(body)
        if not isinstance(found, dict) or found.get("kind") != "checkpoint" or not found.keys() >= _BELIEVED:
            return None
        believed = {name: found[name] for name in _BELIEVED}
        return UnreadableCheckpoint.model_validate({**believed, "problem": problem})
    except (ValueError, RecursionError):
        return None
