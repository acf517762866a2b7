"""A stretch of memory that is also a file: written through a mapping here, read as a file in another process.

It knows nothing of what is in it. The invariant: it has no name in any file system, so the kernel takes it back
when the last process that holds it ends, however that ends; and once it has grown it is written over, never
allocated anew.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import os
from pathlib import Path


class Segment:
    """Anonymous shared memory (``memfd_create``, Linux). Not for several threads at once."""

    def __init__(self, name: str) -> None:
        self.fd = os.memfd_create(name)
        self._mapped: mmap.mmap | None = None

    @property
    def path(self) -> Path:
        """Where this process, or one that was given `fd`, opens it as a file of its own position."""
        return Path(f"/proc/self/fd/{self.fd}")

    @property
    def size_bytes(self) -> int:
        """How large the file is now."""
        return os.fstat(self.fd).st_size

    def map(self, size_bytes: int) -> mmap.mmap:
        """Make it a file of this size, and return its memory; what was mapped before must be in use no more."""
        self._mapped = None
        os.ftruncate(self.fd, size_bytes)
        self._mapped = mmap.mmap(self.fd, size_bytes)
        return self._mapped

    def rewrite(self) -> Rewriting:
        """A file object that writes it over from its start; `finish` cuts off what was longer before."""
        return Rewriting(self.fd)

    def close(self) -> None:
        """Give the memory back, unless somebody else holds it."""
        self._mapped = None
        os.close(self.fd)


class Rewriting(io.RawIOBase):
    """Writes a segment over from its start; a write takes all it is given, which one system call need not do."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._position = 0

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: memoryview) -> int:  # type: ignore[override]  # typeshed's Buffer is Python 3.12's
        """Copy all of `data`."""
        left = memoryview(data).cast("B")
        while left:
            written = os.pwrite(self._fd, left, self._position)
            left, self._position = left[written:], self._position + written
        return memoryview(data).nbytes

    def finish(self) -> None:
        """The file ends where writing stopped."""
        os.ftruncate(self._fd, self._position)


def address_of(mapped: mmap.mmap) -> int:
    """Where a mapping lies in this process's memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))
