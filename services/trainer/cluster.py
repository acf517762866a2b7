"""What the Ray cluster has, asked by a process beside the runner: `python -m services.trainer.cluster`.

The runner loads no Ray: it starts this process, which looks every second and says what it sees, one JSON object a
line. What has not been said lately is not known. Without a cluster, where every driver starts a Ray of its own,
the machine itself is what there is.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Protocol

from services.runtime.lifecycle import Stop, stop_with_parent
from services.runtime.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LOOK_INTERVAL_S = 1.0
BELIEVED_FOR_S = 10.0
RESTART_AFTER_S = 5.0
WATCHER = (sys.executable, "-m", "services.trainer.cluster")


class Cluster(Protocol):
    """Something that has resources."""

    def totals(self) -> Mapping[str, float] | None:
        """What it has, by Ray's names; None while that is not known."""
        ...

    def close(self) -> None:
        """Look no more."""
        ...


class ThisMachine:
    """The machine that a driver starts its own Ray on. Its GPUs are left for Ray to count."""

    def totals(self) -> Mapping[str, float] | None:
        """Its processors."""
        return {"CPU": float(os.cpu_count() or 1), "GPU": math.inf}

    def close(self) -> None:
        """Nothing looks."""


class WatchedCluster:
    """A cluster elsewhere, as the process that watches it sees it; the process ends with `close`, or with us."""

    def __init__(self, *, command: Sequence[str] = WATCHER) -> None:
        self._command = command
        self._said: tuple[float, dict[str, float]] | None = None
        self._started_at = -1e9
        self._process: subprocess.Popen[bytes] | None = None
        self._keep_running()

    def totals(self) -> Mapping[str, float] | None:
        """What the watcher said last, unless that was too long ago."""
        self._keep_running()
        if self._said is None or time.monotonic() - self._said[0] > BELIEVED_FOR_S:
            return None
        return self._said[1]

    def close(self) -> None:
        """End the watcher."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _keep_running(self) -> None:
        is_alive = self._process is not None and self._process.poll() is None
        if is_alive or time.monotonic() - self._started_at < RESTART_AFTER_S:
            return
        self._started_at = time.monotonic()
        argv = [*self._command, "--parent-pid", str(os.getpid())]
        self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        threading.Thread(target=self._listen, args=(self._process,), name="cluster", daemon=True).start()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None  # noqa: S101  it was asked for
        with process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):  # a line that was cut by its writer's end
                    self._said = (time.monotonic(), json.loads(line))


def open_cluster(settings: Settings) -> Cluster:
    """The cluster that the settings name."""
    return WatchedCluster() if settings.ray_address is not None else ThisMachine()


def main() -> int:
    """Watch, and say what is seen, until the runner is gone."""
    from services.trainer.job import fetch_totals

    stop = Stop()
    stop_with_parent(stop, parent_pid=int(sys.argv[sys.argv.index("--parent-pid") + 1]))
    address = Settings().ray_address or ""
    while not stop.is_set:
        totals = fetch_totals(address)
        if totals is not None:
            sys.stdout.write(json.dumps(totals) + "\n")
            sys.stdout.flush()
        stop.wait(LOOK_INTERVAL_S)
    return 0


if __name__ == "__main__":
    sys.exit(main())
