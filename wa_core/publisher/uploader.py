"""A process that writes checkpoints, as the trainer sees it: started early, asked, replaced once if it dies.

It knows no torch and nothing of what is written. The invariant: an upload is either written, or an error says why
not; its bytes stay in memory that both processes hold until then, so the death of one uploader loses nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import wa_core
from wa_core.errors import TransientError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wa_core.publisher.writer import Assignment, Upload

log = logging.getLogger(__name__)

_PROGRAM = "wa_core.publisher.child"
_END_TIMEOUT_S = 5.0


class UploaderProcess:
    """A `Writer` in a process of its own. Not for several threads at once.

    Args:
        assignment: what it writes; it goes through the socket, so no secret is in arguments or the environment.
        fds: open files that the paths of uploads name.
    """

    def __init__(self, assignment: Assignment, *, fds: Sequence[int]) -> None:
        self._assignment = assignment
        self._fds = tuple(fds)
        self._start()

    @property
    def pid(self) -> int:
        """Of the process that writes now."""
        return self._process.pid

    def write(self, upload: Upload) -> None:
        """See `Writer`. A process that dies over it is replaced, and asked again, once.

        Raises:
            TransientError: the second one died as well (`uploader_lost`).
        """
        for is_last in (False, True):
            try:
                self._connection.send(upload)
                failure = self._connection.recv()
            except (EOFError, OSError):
                how = self._end()
                if is_last:
                    break
                log.warning("the uploader %s at step %d; another one takes over", how, upload.entry.step)
                self._start()
            else:
                if failure is not None:
                    raise failure
                return
        raise TransientError(
            f"the checkpoint of step {upload.entry.step} was not uploaded: the process that does it {how}, twice; "
            "is there enough memory? Training resumes from the last committed checkpoint",
            code="uploader_lost",
        )

    def close(self) -> None:
        """Let the process end; it has nothing left to do."""
        try:
            self._connection.send(None)
        except OSError:  # it is gone already
            pass
        else:
            self._wait()
        self._end()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        with theirs:
            # A session of its own: what a terminal or a supervisor sends to the trainer's group is the trainer's
            # to act on. Without -P the working directory would come first where modules are looked for.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _PROGRAM, str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(), *self._fds),
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": _search_path()},
                start_new_session=True,
            )
        with contextlib.suppress(OSError):  # ended at once: `write` finds out
            self._connection.send(self._assignment)

    def _wait(self) -> None:
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            log.warning("the uploader did not end within %.0f s; it is killed", _END_TIMEOUT_S)

    def _end(self) -> str:
        """Make sure that it is gone, and say how it went."""
        self._connection.close()
        self._process.kill()  # without effect on one that has ended
        code = self._process.wait()
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _search_path() -> str:
    """Where the process finds this very package, then whatever the trainer's environment says."""
    ours = str(Path(wa_core.__file__).parents[1])
    return os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))
