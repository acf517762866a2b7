"""The averager's working space: a folder of its own on a disk with room, and a limit on memory for accumulators.

It knows files and byte counts; no runs and no tensors. What a killed averager left is removed by the next one that
starts on the same parent folder (`services.runtime.folder`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Self

from services.runtime.folder import OwnFolder

_PREFIX = "wa-averager-"
MEMORY_BYTES = 256 << 20


class Scratch:
    """Working space; a context manager whose end removes it.

    Args:
        parent: the folder to work in; None for the system's temporary folder.
        memory_bytes: how much memory all accumulators together may take; beyond it they live in files.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, parent: Path | None = None, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._own = OwnFolder(_PREFIX, parent=parent)
        self.folder = self._own.path
        self._memory_bytes = memory_bytes
        self._taken: dict[object, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything."""
        self._own.close()

    def place(self, owner: object, size_bytes: int) -> Path | None:
        """Where the accumulators of `owner` go: None for memory, or the folder for a file.

        What `owner` had before is given back first.
        """
        self.release(owner)
        if sum(self._taken.values()) + size_bytes > self._memory_bytes:
            return self.folder
        self._taken[owner] = size_bytes
        return None

    def release(self, owner: object) -> None:
        """Give the memory of `owner` back."""
        self._taken.pop(owner, None)

    def new_folder(self, prefix: str) -> Path:
        """A new folder, for its user to remove."""
        return Path(tempfile.mkdtemp(prefix=prefix, dir=self.folder))
