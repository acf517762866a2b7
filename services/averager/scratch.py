"""The averager's working space: a folder of its own on a disk with room, and a limit on memory for accumulators.

It knows files and byte counts; no runs and no tensors. The invariant: what a killed averager left behind is
removed by the next one that starts on the same parent folder, and what a living one uses is never touched.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Self

_PREFIX = "wa-averager-"
_LOCK = "lock"
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
        parent = parent or Path(tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock = _try_lock(self.folder)
        self._memory_bytes = memory_bytes
        self._taken: dict[object, int] = {}
        _remove_abandoned(parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

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


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(_PREFIX + "*"):
        lock = _try_lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _try_lock(folder: Path) -> int | None:
    """Lock a working folder; None when a living process holds it, or somebody else removes it just now."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
