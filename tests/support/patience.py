"""Waiting for what another process or thread does, without knowing how fast the machine is.

The limits are for what never comes: they are far longer than anything takes, so that a machine which does much
else fails no test. Whatever comes is seen within a twentieth of a second.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE_S = 120.0

T = TypeVar("T")


def eventually(found: Callable[[], T], *, what: str, timeout_s: float = PATIENCE_S) -> T:
    """Poll until `found` returns something true, and return that."""
    deadline = time.monotonic() + timeout_s
    while not (result := found()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:g} s"
        time.sleep(0.05)
    return result
