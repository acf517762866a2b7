"""Where accumulators live: in memory, or in a scratch file for models larger than memory.

It knows bytes at offsets; not tensors or rules. The invariant: what was saved at an offset is what is loaded from
there, in this process; nothing survives it. A file is read and written with plain `pread` and `pwrite`: mapped
into memory it was slower and counted as the process's memory.
"""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Protocol

import numpy as np

from wa_core.averaging.buffers import new_buffer
from wa_core.errors import StoreUnavailableError

if TYPE_CHECKING:
    from pathlib import Path

    from wa_core.averaging.buffers import Raw


class Storage(Protocol):
    """A run of bytes that blocks are loaded from and saved to."""

    def load(self, begin: int, size_bytes: int) -> Raw:
        """The bytes from `begin` on, writable; valid until the next `load`."""
        ...

    def save(self, begin: int, raw: Raw) -> None:
        """Keep a block: the array that `load` returned for this place, changed, or another."""
        ...

    def close(self) -> None:
        """Give the space back."""
        ...


class MemoryStorage:
    """Bytes in memory; what `load` returns is the place itself."""

    def __init__(self, size_bytes: int) -> None:
        self._bytes = self._loaded = new_buffer(size_bytes)

    def load(self, begin: int, size_bytes: int) -> Raw:
        """The bytes from `begin` on, in place."""
        self._loaded = self._bytes[begin : begin + size_bytes]
        return self._loaded

    def save(self, begin: int, raw: Raw) -> None:
        """Copy, unless `raw` is the place itself."""
        if raw is not self._loaded:
            self._bytes[begin : begin + len(raw)] = raw

    def close(self) -> None:
        """Let go of the memory."""
        self._bytes = self._loaded = np.empty(0, np.uint8)


class FileStorage:
    """Bytes in a file without a name, which the system removes with the process, whatever ends it.

    Args:
        folder: on the disk that has room.
        size_bytes: reserved at once, so that a full disk is found before the first fold.

    Raises:
        StoreUnavailableError: the folder cannot be written or the disk is full.
    """

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self._folder = folder
        self._buffer = np.empty(0, np.uint8)
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by `close`
            try:
                if size_bytes:
                    os.posix_fallocate(self._file.fileno(), 0, size_bytes)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise self._failed(error) from error

    def load(self, begin: int, size_bytes: int) -> Raw:
        """The bytes from `begin` on, in a buffer that the next `load` reuses."""
        if len(self._buffer) < size_bytes:
            self._buffer = new_buffer(size_bytes)
        found, filled = self._buffer[:size_bytes], 0
        try:
            # The space was reserved, so the file never ends before.
            while filled < size_bytes:
                filled += os.preadv(self._file.fileno(), [found[filled:].data], begin + filled)
        except OSError as error:
            raise self._failed(error) from error
        return found

    def save(self, begin: int, raw: Raw) -> None:
        """Write a block."""
        data = raw.data
        try:
            while data:
                written = os.pwrite(self._file.fileno(), data, begin)
                begin, data = begin + written, data[written:]
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Remove the file."""
        self._file.close()

    def _failed(self, error: OSError) -> StoreUnavailableError:
        return StoreUnavailableError(
            f"the scratch file in {self._folder} cannot be used: {error.strerror or error}; free the space or "
            f"choose another folder"
        )
