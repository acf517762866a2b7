"""A driver process as its runner sees it: start, ask it to stop, make it stop.

It leads a session and process group of its own, so that killing the group leaves nothing of it behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from services.trainer import trace
from services.trainer.failure import Failure

if TYPE_CHECKING:
    from collections.abc import Sequence

DRIVER = (sys.executable, "-m", "services.trainer.driver")


class Child:
    """One attempt's driver. What it leaves in temporary files goes into a folder of its own below `folder`."""

    def __init__(
        self,
        run_id: str,
        attempt: int,
        *,
        command: Sequence[str] = DRIVER,
        folder: Path | None = None,
        traceparent: str | None = None,
    ) -> None:
        self.run_id = run_id
        self.attempt = attempt
        self._folder = Path(tempfile.mkdtemp(prefix="driver-", dir=folder))
        self._result = self._folder / "failure.json"
        self._failure: Failure | None = None
        self._process = subprocess.Popen(
            [
                *command,
                *("--run-id", run_id),
                *("--attempt", str(attempt)),
                *("--result", str(self._result)),
                *("--parent-pid", str(os.getpid())),
            ],
            stdin=subprocess.DEVNULL,
            env=_environment(traceparent)
            | {"TMPDIR": str(self._folder)},  # what a killed one leaves goes with the folder
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The driver's process id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the driver still runs."""
        return self._process.poll() is None

    def interrupt(self) -> None:
        """Ask it to abort in good order (Ray listens to SIGINT alone)."""
        if self.is_alive:
            self._process.send_signal(signal.SIGINT)

    def terminate(self) -> None:
        """Ask it to end, whatever it is at."""
        if self.is_alive:
            self._process.terminate()

    def wait(self, seconds: float) -> bool:
        """Give it time; returns whether it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return not self.is_alive

    def kill(self) -> None:
        """End it and whatever is left of its group, at once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def reap(self) -> Failure:
        """Clean up after it, and say why it failed (only of interest when it did). May be called again."""
        if self._failure is None:
            self.kill()
            self._failure = Failure.found(self._result, exit_code=self._process.returncode)
            shutil.rmtree(self._folder, ignore_errors=True)
        return self._failure


def _environment(traceparent: str | None) -> dict[str, str]:
    """What a driver inherits, and with it the workers of a Ray of its own: nothing that it has no use for."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in {"WA_WEBHOOK_SECRET", trace.VARIABLE}
    }
    return inherited | ({trace.VARIABLE: traceparent} if traceparent else {})
