"""Asks torch for the same bits every time, also on a GPU, and gives the process back as it was.

On a CPU training is deterministic without it. An operation that has no deterministic form raises and says so.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # read by CUDA when it starts


@contextmanager
def deterministic(is_wanted: bool) -> Iterator[None]:  # noqa: FBT001  it reads as what it is: deterministic(wanted)
    """Deterministic algorithms alone until the block is left, if `is_wanted`."""
    if not is_wanted:
        yield
        return
    before = (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
    os.environ.setdefault(_CUBLAS, ":4096:8")
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=before[0])
        torch.backends.cudnn.benchmark = before[1]
