"""The averager's child processes with a recipe of the tests' in place of the built-in ones."""

from __future__ import annotations

import sys
from pathlib import Path

_TESTS = str(Path(__file__).parent.parent)


def serving(module: str) -> tuple[str, str, str]:
    """The command line of a process that runs a module's `serve`."""
    return (
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {_TESTS!r}); import {module} as it; sys.exit(it.serve())",
    )
