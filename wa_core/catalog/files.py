"""Stored files and their digests: what a record says of a file is computed from the very bytes that were sent."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, BinaryIO, cast

from wa_core.catalog.commit import COMMIT_PATIENCE_S, patiently
from wa_core.records import FileRef
from wa_core.store.hashed import HashedFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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


def put_path(
    store: ObjectStore,
    key: str,
    path: Path,
    *,
    on_read: Callable[[], None] = lambda: None,
    patience_s: float = COMMIT_PATIENCE_S,
) -> FileRef:
    """Upload a local file, in parts when it is large; as `put_file`, with little memory.

    Args:
        store: the bucket.
        key: where to.
        path: the file; nobody may change it meanwhile.
        on_read: called from time to time while the file is read; what it raises ends the upload.
        patience_s: for how long to try again while the store is away.

    Raises:
        TransientError: the store stayed away for longer than `patience_s`.
    """
    with path.open("rb", buffering=0) as file:
        body = HashedFile(file, on_read)

        def send() -> None:
            body.seek(0)
            store.put(key, cast("BinaryIO", body))

        patiently(send, patience_s=patience_s)
    return FileRef(key=key, size_bytes=body.size_bytes, sha256=body.sha256)
