"""Finds and kills every process that a stack left behind, its grandchildren included. Never by name.

A process belongs to a stack if its environment carries the stack's marker, or if it lives in the session of
one of the stack's own children. Both are needed: a Ray agent overwrites its environment when it sets its
title, and a program may start a session of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from wa_core.errors import WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

MARKER = "WA_STACK_ID"
_KILL_PATIENCE_S = 10.0


class ProcessRef(BaseModel):
    """A process id with its start time (opaque text), which together name one process for ever."""

    model_config = ConfigDict(frozen=True)

    pid: int
    started: str


@dataclass(frozen=True, slots=True)
class Seen:
    """One living process. `session` is its session id on Linux and its process group elsewhere."""

    pid: int
    session: int
    started: str
    environment: str


def reference(pid: int) -> ProcessRef:
    """Name the running process `pid`; its start time is empty if it has already gone."""
    return ProcessRef(pid=pid, started=next((seen.started for seen in snapshot() if seen.pid == pid), ""))


def is_alive(process: ProcessRef) -> bool:
    """Whether just this process still runs, not another one that was given its id."""
    return any((seen.pid, seen.started) == (process.pid, process.started) for seen in snapshot())


def members(stack_id: str, leaders: Collection[ProcessRef]) -> list[int]:
    """The ids of all living processes of a stack, this process excepted."""
    marker = f"{MARKER}={stack_id}"
    everyone = list(snapshot())
    sessions = _own_sessions(everyone, leaders)
    return [
        seen.pid
        for seen in everyone
        if seen.pid != os.getpid() and (seen.session in sessions or marker in seen.environment)
    ]


def session_members(leader: ProcessRef) -> list[int]:
    """The ids of all living processes in the session that `leader` started."""
    everyone = list(snapshot())
    return [seen.pid for seen in everyone if seen.session in _own_sessions(everyone, [leader])]


def kill_all(find: Callable[[], list[int]]) -> list[int]:
    """SIGKILL what `find` finds until it finds nothing; returns the ids killed.

    Raises:
        WeightAveragingError: some of them outlived 10 seconds of it.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + _KILL_PATIENCE_S
    while found := find():
        if time.monotonic() > deadline:
            raise WeightAveragingError(f"processes {found} did not end on SIGKILL; look at them with ps")
        for pid in found:
            killed.add(pid)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
    return sorted(killed)


def snapshot() -> Iterator[Seen]:
    """Every living process that may be looked into; zombies are gone already."""
    return _from_proc(Path("/proc")) if sys.platform == "linux" else _from_ps()


def parse_stat(text: str) -> tuple[str, int, str]:
    """State, session id and start time (clock ticks since boot) from a `/proc/PID/stat` line.

    The command name may hold spaces and parentheses, so fields are counted from its last parenthesis.
    Source: proc_pid_stat(5).
    """
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[3]), fields[19]


def parse_ps(line: str) -> Seen | None:
    """One line of ``ps -A -E -ww -o pid=,pgid=,state=,lstart=,command=`` (macOS), or None for a zombie."""
    pid, group, state, *rest = line.split(maxsplit=8)
    if state.startswith("Z"):
        return None
    return Seen(pid=int(pid), session=int(group), started=" ".join(rest[:5]), environment="".join(rest[5:]))


def _own_sessions(everyone: Collection[Seen], leaders: Collection[ProcessRef]) -> set[int]:
    # A session id stays taken while the session has members, so only a leader with another start time is a
    # stranger who was given the number later.
    started = {seen.pid: seen.started for seen in everyone}
    return {ref.pid for ref in leaders if started.get(ref.pid, ref.started) == ref.started}


def _from_proc(root: Path) -> Iterator[Seen]:
    for entry in root.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state, session, started = parse_stat((entry / "stat").read_text(errors="replace"))
        except (OSError, IndexError, ValueError):
            continue  # it ended while we looked
        if state in {"Z", "X"}:
            continue
        try:
            environment = (entry / "environ").read_bytes().decode(errors="replace")
        except OSError:
            environment = ""  # another user's process
        yield Seen(pid=int(entry.name), session=session, started=started, environment=environment)


def _from_ps() -> Iterator[Seen]:
    listing = subprocess.run(
        ["ps", "-A", "-E", "-ww", "-o", "pid=,pgid=,state=,lstart=,command="],
        capture_output=True,
        text=True,
        check=True,
    )
    return (seen for line in listing.stdout.splitlines() if (seen := parse_ps(line)) is not None)
