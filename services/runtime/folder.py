"""A process's own folder for temporary files, on a disk of the operator's choice.

The invariant: what a killed process left behind is removed by the next one of its kind that starts on the same
parent folder, and what a living one uses is never touched.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_LOCK = "lock"


class OwnFolder:
    """A folder that is this process's while it lives.

    Args:
        prefix: begins the folder's name, and the names of those of the same kind.
        parent: the folder to make it in; None for the system's temporary folder.

    Raises:
        OSError: the parent cannot be written.
    """

    def __init__(self, prefix: str, *, parent: Path | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        # It gets its name once it is locked: by that name another process would take it for abandoned before.
        made = Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=parent))
        self._lock = _try_lock(made)
        self.path = made.rename(parent / made.name.removeprefix("."))
        _remove_abandoned(parent, prefix=prefix)

    def close(self) -> None:
        """Remove it and everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove_abandoned(parent: Path, *, prefix: str) -> None:
    for folder in parent.glob(prefix + "*"):
        lock = _try_lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _try_lock(folder: Path) -> int | None:
    """Lock a folder; None when a living process holds it, or somebody else removes it just now."""
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
