"""Stored files and their digests: what a record says of a file is computed from the very bytes that were sent."""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING, BinaryIO, cast

from wa_core.catalog.commit import COMMIT_PATIENCE_S, patiently
from wa_core.records import FileRef

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
        watched = _Watched(file, on_read)
        digest = hashlib.file_digest(watched, "sha256")  # type: ignore[arg-type]  # it is read with `readinto`
        size_bytes = file.tell()

        def send() -> None:
            file.seek(0)
            store.put(key, cast("BinaryIO", watched))

        patiently(send, patience_s=patience_s)
    return FileRef(key=key, size_bytes=size_bytes, sha256=digest.hexdigest())


class _Watched(io.RawIOBase):
    """A file that says when it is read."""

    def __init__(self, file: io.FileIO, on_read: Callable[[], None]) -> None:
        self._file = file
        self._on_read = on_read

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's Buffer is Python 3.12's
        self._on_read()
        return self._file.readinto(buffer) or 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
