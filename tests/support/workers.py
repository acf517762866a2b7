"""Real averagers, each started as users start them: `python -m services.averager`."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Self

from support.nursery import ROOT, AveragerProcess

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from support.seaweed import Seaweed


def averager_settings(seaweed: Seaweed, *, endpoint_url: str, bucket: str) -> dict[str, str]:
    """An averager's environment."""
    return {
        "WA_STORE_URL": f"s3://{bucket}",
        "WA_S3_ENDPOINT": endpoint_url,
        "WA_S3_ACCESS_KEY": seaweed.access_key,
        "WA_S3_SECRET_KEY": seaweed.secret_key,
        "WA_LOG_FORMAT": "json",
    }


class Workers:
    """Starts averagers; a context manager whose end kills those that are left.

    Args:
        folder: where their logs and scratch folders go.
        environment: their settings.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "WA_SCRATCH_DIR": str(folder / "scratch"),
            **environment,
        }
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._num_started = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()

    def start(self) -> AveragerProcess:
        """Start another one."""
        path = self._folder / f"averager-{self._num_started}.log"
        self._num_started += 1
        with path.open("wb") as log:
            argv = [sys.executable, "-m", "services.averager"]
            process = subprocess.Popen(argv, env=self._environment, stderr=log)
        self._processes[process.pid] = process
        return AveragerProcess(process.pid, path)

    def kill(self, averager: AveragerProcess) -> None:
        """SIGKILL, and wait for its end."""
        process = self._processes.pop(averager.pid)
        process.kill()
        process.wait()
