"""What a process that runs user code does first, to harm nobody: the other end of `services.runtime.child`."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import TextIO

_PR_SET_PDEATHSIG = 1


def yield_to_others(*, niceness: int) -> None:
    """Be the first to go when memory runs out, do not outlive the parent, and leave others the processor.

    The parent is the *thread* that started this process.
    """
    os.nice(niceness)
    score = Path("/proc/self/oom_score_adj")  # Linux; elsewhere the parent's limit must do
    if score.exists():
        score.write_text("1000")
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def take_stdout() -> TextIO:
    """Keep stdout for answers, and send what user code prints to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers
