"""Stopping a stack from another process: when `stop_stack` returns, the supervisor has really ended."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from services.stack.detached import stop_stack
from services.stack.leftovers import is_alive, reference

if TYPE_CHECKING:
    from pathlib import Path

# Lets go of the folder on SIGTERM, as a supervisor does, but takes a second more to end.
_SLOW_TO_END = """
import os, pathlib, signal, sys, time
from services.stack.state import DataFolder, StackState
folder = DataFolder(pathlib.Path(sys.argv[1]))
signal.signal(signal.SIGTERM, lambda *_: None)
with folder.lock():
    folder.write_state(StackState(stack_id="none", supervisor_pid=os.getpid()))
    print("holds", flush=True)
    signal.pause()
    folder.clear_state()
time.sleep(1)
"""


def test_stopping_waits_for_the_supervisor_itself(tmp_path: Path) -> None:
    """A supervisor that has let go of the folder but not ended yet is waited for: no process is left behind."""
    supervisor = subprocess.Popen(
        [sys.executable, "-c", _SLOW_TO_END, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "holds\n"
        process = reference(supervisor.pid)
        assert is_alive(process)

        report = stop_stack(tmp_path)

        assert not is_alive(process)
        assert report.supervisor_pid == supervisor.pid
    finally:
        supervisor.kill()
        supervisor.communicate()
