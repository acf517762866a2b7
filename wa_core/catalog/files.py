"""Stored files and their digests: what a record says of a file is computed from the very bytes that were sent."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from wa_core.catalog.commit import COMMIT_PATIENCE_S, patiently
from wa_core.records import FileRef

if TYPE_CHECKING:
    from wa_core.store.base import ObjectStore


def put_file(store: ObjectStore, key: str, body: bytes, *, patience_s: float = COMMIT_PATIENCE_S) -> FileRef:
    """Upload `body` and return the reference that a record may carry.

    Commit that record only after this returns: a crash in between leaves an orphan, never a dangling reference.

    Raises:
        TransientError: the store stayed away for longer than `patience_s`.
    """
    ref = FileRef(key=key, size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest())
    patiently(lambda: store.put(key, body), patience_s=patience_s)
    return ref
