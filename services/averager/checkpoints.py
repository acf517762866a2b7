"""Fetches committed checkpoints, verified against the log entry in the same single read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from wa_core import layout
from wa_core.catalog.commit import patiently
from wa_core.errors import CorruptError, ObjectNotFoundError
from wa_core.tensors import read_checkpoint

if TYPE_CHECKING:
    from wa_core.records import CheckpointCommitted, FileRef
    from wa_core.store.base import ObjectStore
    from wa_core.tensors import Checkpoint

log = structlog.get_logger(__name__)

READS_BEFORE_REJECTION = 3


def fetch_checkpoint(store: ObjectStore, entry: CheckpointCommitted) -> Checkpoint:
    """Read a checkpoint's weights.

    Bytes that arrive wrong are read again, up to `READS_BEFORE_REJECTION` times in all: a truncated or flipped
    transfer heals, a corrupt object does not.

    Raises:
        CorruptError: the object is absent, or its bytes are not what the log entry says.
        TransientError: the store is away.
    """
    ref = entry.files.get(layout.MODEL_FILE)
    if ref is None:
        raise CorruptError(f"checkpoint of step {entry.step} lists no {layout.MODEL_FILE}", code="object_missing")
    for read in range(1, READS_BEFORE_REJECTION):
        try:
            return read_file(store, ref)
        except CorruptError as error:
            log.warning("checkpoint_read_again", key=ref.key, code=error.code, read=read)
    return read_file(store, ref)


def read_file(store: ObjectStore, ref: FileRef) -> Checkpoint:
    """Read and verify one safetensors file that a record points to, riding out passing store faults.

    Raises:
        CorruptError: it is absent, or its bytes are not what the record says.
        TransientError: the store stayed away.
    """

    def read() -> Checkpoint:
        return read_checkpoint(store.stream(ref.key), size_bytes=ref.size_bytes, sha256=ref.sha256)

    try:
        return patiently(read, patience_s=30.0)
    except ObjectNotFoundError:
        raise CorruptError(f"{ref.key} is recorded but absent from the bucket", code="object_missing") from None
