"""Who a runner is, and whether another one is provably gone.

A runner's id holds what a later runner on the same machine can check: the machine, its process namespace and the
process id. Nothing is concluded about runners of other machines; their heartbeats have to tell.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path


def new_runner_id() -> str:
    """An id for this process, unique over restarts."""
    return f"{_place()}/{os.getpid()}/{secrets.token_hex(4)}"


def is_provably_gone(runner_id: str) -> bool:
    """Whether the process of another runner's id has ended; False also when that cannot be known from here."""
    place, _, rest = runner_id.rpartition("/")[0].rpartition("/")
    if place != _place() or not rest.isdigit():
        return False
    pid = int(rest)
    if pid == os.getpid():
        return True  # its process id is ours now, so it is not its own any more
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _place() -> str:
    try:
        namespace = Path("/proc/self/ns/pid").readlink().name
    except OSError:
        namespace = "-"
    return f"{socket.gethostname()}/{namespace}"
