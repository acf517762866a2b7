"""The stack in the background: start a supervisor in a session of its own, stop it from another process.

The supervisor says over a pipe, in one JSON line, that it is ready or why it is not.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.stack.embedded import StoppedEarlyError, sweep
from services.stack.leftovers import is_alive, reference
from services.stack.state import DataFolder
from wa_core.errors import ConfigurationError, ConflictError, WeightAveragingError

if TYPE_CHECKING:
    from pathlib import Path

    from services.stack.embedded import StackOptions
    from services.stack.state import Connection, StackState

_POLL_S = 0.05
_STATE_PATIENCE_S = 2.0
_END_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class StopReport:
    """What `stop_stack` did: the supervisor it ended, and leftovers of one that had been killed."""

    supervisor_pid: int | None = None
    stopped: dict[str, int] | None = None
    leftovers: tuple[int, ...] = ()


def start_detached(options: StackOptions, *, is_tied: bool = False) -> Connection:
    """Start the stack in the background; returns when it is ready.

    Args:
        options: where and on which ports.
        is_tied: let the stack end by itself when this process dies, however it dies.

    Raises:
        ConflictError: a stack already runs there.
        ConfigurationError: it could not be started; nothing is left running.
    """
    folder = DataFolder(options.data.resolve())
    folder.prepare()
    supervisor = _launch(folder, options, is_tied=is_tied)
    try:
        answer = _answer(supervisor)
    except BaseException:  # Ctrl-C while waiting: the half-started stack must go too
        supervisor.send_signal(signal.SIGTERM)
        supervisor.wait()
        raise
    connection = folder.connection() if answer.get("ready") else None
    if connection is None:
        supervisor.wait()
        raise _refusal(answer, folder)
    return connection


def stop_stack(data: Path) -> StopReport:
    """Stop the stack that runs on `data`, and clean up after one whose supervisor was killed.

    Raises:
        WeightAveragingError: something would not end.
    """
    folder = DataFolder(data.resolve())
    state = folder.read_state()
    if folder.is_locked():
        state = state or _await_state(folder)
        _end_supervisor(folder, state.supervisor_pid)
        with folder.lock():
            leftovers = sweep(folder)
        return StopReport(state.supervisor_pid, dict(state.pids), tuple(leftovers))
    if state is None:
        return StopReport()
    with folder.lock():
        return StopReport(leftovers=tuple(sweep(folder)))


def _launch(folder: DataFolder, options: StackOptions, *, is_tied: bool) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "services.stack", "--data", str(folder.path)]
    argv += ["--port", str(options.api_port)] if options.api_port else []
    argv += ["--parent", str(os.getpid())] if is_tied else []
    with (folder.logs / "supervisor.log").open("ab") as output:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=output, start_new_session=True
        )


def _answer(supervisor: subprocess.Popen[bytes]) -> dict[str, str | bool]:
    assert supervisor.stdout is not None  # noqa: S101  it was started with a pipe
    with supervisor.stdout as pipe:
        line = pipe.readline()
    return dict(json.loads(line)) if line else {}


def _refusal(answer: dict[str, str | bool], folder: DataFolder) -> WeightAveragingError:
    message = str(answer.get("error") or f"the supervisor died; see {folder.logs / 'supervisor.log'}")
    classes: list[type[WeightAveragingError]] = [ConflictError, StoppedEarlyError]
    for error in classes:
        if answer.get("kind") == error.kind:
            return error(message)
    return ConfigurationError(message)


def _await_state(folder: DataFolder) -> StackState:
    deadline = time.monotonic() + _STATE_PATIENCE_S
    while (state := folder.read_state()) is None:
        if time.monotonic() > deadline:
            raise ConflictError(f"{folder.path} is held by a process that has not said who it is; try again")
        time.sleep(_POLL_S)
    return state


def _end_supervisor(folder: DataFolder, pid: int) -> None:
    """Let the supervisor stop everything; returns when it has let go of the folder and has itself ended."""
    deadline = time.monotonic() + _END_PATIENCE_S
    supervisor = reference(pid)
    with contextlib.suppress(ProcessLookupError):  # it may end by itself meanwhile
        os.kill(pid, signal.SIGTERM)
        while folder.is_locked() or is_alive(supervisor):
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)  # its children are swept by the caller
                deadline = float("inf")
            time.sleep(_POLL_S)
