"""Committed checkpoints as sources to fold from, verified against their log entry while they are read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from wa_core.averaging.files.parts import ObjectPart
from wa_core.averaging.files.sources import FilesSource
from wa_core.catalog.checkpoints import checkpoint_file
from wa_core.errors import CorruptError, ObjectNotFoundError

if TYPE_CHECKING:
    from pathlib import Path

    from wa_core.averaging.files.parts import Part
    from wa_core.records import CheckpointCommitted, FileRef
    from wa_core.store.base import ObjectStore

_WHOLE_BYTES = 1 << 20  # an object up to this size costs one request, not one for each of its parts


class Copy:
    """A local copy of a checkpoint's weights, made from the bytes that are read anyway; whole once all were read.

    Args:
        path: where it goes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_sound = True
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def write(self, begin: int, data: memoryview) -> None:
        """Keep `data` at byte `begin`; from a disk that is full on, there is no copy, and nobody is troubled."""
        try:
            while data and self.is_sound:
                written = os.pwrite(self._fd, data, begin)
                begin, data = begin + written, data[written:]
        except OSError:
            self.is_sound = False

    def close(self) -> None:
        """No more comes."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def remove(self) -> None:
        """Give the space back."""
        self.close()
        self.path.unlink(missing_ok=True)


class _CopiedPart:
    """A part that copies whatever is read of it."""

    is_remote = True

    def __init__(self, inner: Part, copy: Copy) -> None:
        self.name, self.size_bytes, self.sha256 = inner.name, inner.size_bytes, inner.sha256
        self._inner = inner
        self._copy = copy

    def read_into(self, begin: int, out: memoryview) -> int:
        """Fill `out` from byte `begin` on; how many bytes there were."""
        found = self._inner.read_into(begin, out)
        self._copy.write(begin, out[:found])
        return found

    def close(self) -> None:
        """Close both."""
        self._inner.close()
        self._copy.close()


def open_checkpoint(
    store: ObjectStore, run_id: str, entry: CheckpointCommitted, *, copy: Copy | None = None
) -> FilesSource:
    """Open a checkpoint's weights; the header is read and checked, the data not yet.

    Args:
        store: the bucket.
        run_id: the checkpoint's run; files elsewhere are not read.
        entry: what the log says of the checkpoint.
        copy: keeps what is read.

    Raises:
        CorruptError: the entry itself is at fault (`checkpoint_file`), the object is absent (`object_missing`), or
            its size or header is not what it should be.
        IncompatibleError: two names have one canonical form.
        TransientError: the store is away.
    """
    return open_file(store, checkpoint_file(run_id, entry), step=entry.step, copy=copy)


def open_file(
    store: ObjectStore, ref: FileRef, *, step: int | None = None, copy: Copy | None = None
) -> FilesSource:
    """Open a safetensors file that a record points to; see `open_checkpoint`."""
    try:
        part: Part = ObjectPart(
            store, ref.key, size_bytes=ref.size_bytes, sha256=ref.sha256, whole_bytes=_WHOLE_BYTES
        )
    except ObjectNotFoundError:
        raise CorruptError(f"{ref.key} is recorded but absent from the bucket", code="object_missing") from None
    return FilesSource(ref.key, [part if copy is None else _CopiedPart(part, copy)], step=step)
