"""Letting other processes go first. It knows nothing of what the process does.

The invariant: it lowers this process and what it starts, never one that was there before.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

_OF_THE_SESSION = Path("/proc/self/autogroup")  # where Linux groups sessions (CONFIG_SCHED_AUTOGROUP)
_TRIES, _TRY_INTERVAL_S = 10, 0.1


def give_way(*, niceness: int) -> None:
    """Take what other processes leave of the processors.

    Linux shares them out between sessions first, and niceness counts only within one: beside a trainer in another
    session, a process of niceness 19 would get as much as it (ADR 0035). So a session of our own is lowered too.
    """
    os.nice(niceness)
    if os.getsid(0) == os.getpid():
        with suppress(OSError):  # a kernel without such groups, or a container that may not say
            _lower_session()


def _lower_session() -> None:
    for _ in range(_TRIES):
        with suppress(BlockingIOError):  # who is not root may say it ten times a second, all processes together
            _OF_THE_SESSION.write_text(str(os.getpriority(os.PRIO_PROCESS, 0)))
            return
        time.sleep(_TRY_INTERVAL_S)
