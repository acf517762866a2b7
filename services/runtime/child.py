"""A process that runs user code, as its parent sees it: started, asked, listened to, watched and ended.

It knows pipes, memory and signals; not what is asked. The invariants: it gets no credentials of ours; after `end`
neither the process nor any that it started is left. What such a process does first: `services.runtime.confined`.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from wa_core.errors import UserCodeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LIMIT_BYTES = 8 << 20  # of what it has said and nobody has taken
_READ_BYTES = 1 << 16
_MEMORY = re.compile(rb"^(?:RssAnon|RssShmem|VmSwap):\s+(\d+) kB$", re.MULTILINE)


class Child:
    """A new process. Importing torch may take it seconds; it can be asked at once.

    Args:
        command: what to run. It reads lines on stdin, answers in lines on stdout, and ends when stdin does.
        title: what messages call it.
        environment: what it is given more than any process that runs user code; it then must run none.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self, command: Sequence[str], *, title: str, environment: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._title = title
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment_without_secrets(), **environment},
            start_new_session=True,  # so that what it starts can be ended with it
        )
        self._unread = b""
        os.set_blocking(self._stdout, False)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def is_ready(self) -> bool:
        """Whether it can be asked: it is alive, and user code has not said anything since its last answer."""
        with contextlib.suppress(UserCodeError):
            return self._is_alive and not self.lines() and not self._unread
        return False

    @property
    def memory_bytes(self) -> int | None:
        """What it holds in memory and swap; pages of mapped files, which the system can drop, do not count.

        None where the system does not tell.
        """
        try:
            status = Path(f"/proc/{self.pid}/status").read_bytes()
        except OSError:
            return None
        return sum(int(found) for found in _MEMORY.findall(status)) << 10

    def ask(self, line: bytes) -> None:
        """Hand it a line, which has no newline in it. Waits while it does not read.

        Raises:
            OSError: it is dead.
        """
        assert self._process.stdin is not None  # noqa: S101  it was started with a pipe
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()

    def wait(self, seconds: float) -> None:
        """Return when it has said something more, has ended, or after so long."""
        select.select([self._stdout], [], [], seconds)

    def lines(self) -> list[bytes]:
        """The whole lines that it has said since the last call; never waits.

        Raises:
            UserCodeError: it is dead, or says more than any job needs.
        """
        is_alive = self._is_alive  # asked first: what a dying process has said is there by now
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._stdout, _READ_BYTES):
                self._unread += chunk
                if len(self._unread) > _LIMIT_BYTES:
                    raise UserCodeError(f"the {self._title} said more than {_LIMIT_BYTES} bytes at once")
        *lines, self._unread = self._unread.split(b"\n")
        if not lines and not is_alive:
            raise UserCodeError(f"the {self._title} died ({_how_it_ended(self._process.returncode)})")
        return lines

    def end(self) -> None:
        """Kill it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        # Not `communicate`, which would wait for any process that has left the group and kept the pipe open.
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]  # it was started with both
        self._process.wait()

    @property
    def _is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def _stdout(self) -> int:
        assert self._process.stdout is not None  # noqa: S101  it was started with a pipe
        return self._process.stdout.fileno()


def environment_without_secrets() -> dict[str, str]:
    """This process's environment for user code: no credentials of ours in it."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WA_", "AWS_", "RAY_AUTH", "OTEL_"))
    }


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}, perhaps because the machine had no memory left" if code == -signal.SIGKILL else name
