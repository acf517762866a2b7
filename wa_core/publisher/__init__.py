"""Publishing checkpoints: a snapshot in shared memory, an upload outside the training process, one commit.

The names here are loaded on first use: the uploader's process imports this package and must not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wa_core.publisher.publisher import CheckpointPublisher
    from wa_core.publisher.restore import Restored
    from wa_core.publisher.run import OwnRun, register_run, resume_run
    from wa_core.publisher.writer import UPLOAD_DEADLINE_S

__all__ = ["UPLOAD_DEADLINE_S", "CheckpointPublisher", "OwnRun", "Restored", "register_run", "resume_run"]

_MODULES = {
    "CheckpointPublisher": "publisher",
    "OwnRun": "run",
    "Restored": "restore",
    "UPLOAD_DEADLINE_S": "writer",
    "register_run": "run",
    "resume_run": "run",
}


def __getattr__(name: str) -> object:
    """Load a public name from its module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
