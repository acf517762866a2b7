"""A local file on its way to a store, with its sha256: read twice, once for the digest and once to be sent.

It is read into one small buffer, again and again, which stays in the processor's cache: as much memory, however
long the file is. It knows no store. The invariant: the digest is of the very bytes that are sent, as long as
nobody changes the file meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_BLOCK_BYTES = 256 << 10  # what is sent at once: a line that takes it within a socket's timeout is no broken one


class HashedFile(io.RawIOBase):
    """A whole file, whose sha256 a store can have its server check without reading it first.

    Args:
        file: the file; it is read from its start, and at once, for the digest.
        on_read: called from time to time while the file is read; what it raises ends the reading.
    """

    def __init__(self, file: io.FileIO, on_read: Callable[[], None] = lambda: None) -> None:
        self._file = file
        self._on_read = on_read
        self.size_bytes = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block)
        self.sha256 = digest.hexdigest()
        file.seek(0)

    def blocks(self) -> Iterator[memoryview]:
        """All of it, from its start; each block is there until the next one is taken.

        Raises:
            OSError: the file ended before its length.
        """
        self._file.seek(0)
        buffer = memoryview(bytearray(min(_BLOCK_BYTES, self.size_bytes)))
        left = self.size_bytes
        while left:
            self._on_read()
            size = self._file.readinto(buffer[:left])
            if not size:
                raise OSError(errno.EIO, "the file became shorter while it was read", self._file.name)
            left -= size
            yield buffer[:size]

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed's Buffer is Python 3.12's
        """Read on."""
        self._on_read()
        return self._file.readinto(buffer) or 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The place."""
        return self._file.tell()
