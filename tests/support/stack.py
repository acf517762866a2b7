"""A real embedded stack for tests: `wa up --detach`, its processes by role, and `wa down` at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from services.client import Client
from services.stack.state import DataFolder
from wa_core.store.s3 import S3Store

if TYPE_CHECKING:
    from pathlib import Path

WA = (sys.executable, "-m", "services.cli")
DIGITS = "services.recipes.digits:Digits"


@dataclass(frozen=True)
class RunningStack:
    """What `wa up --json` said, and where its state is."""

    data: Path
    said: dict[str, Any]

    def client(self) -> Client:
        """A client that waits out an API restart."""
        return Client(self.said["api_url"], token=self.said["token"], patience_s=60.0)

    def store(self) -> S3Store:
        """The stack's bucket."""
        return S3Store(
            bucket=self.said["bucket"],
            endpoint_url=self.said["s3_endpoint"],
            public_endpoint_url=None,
            access_key=self.said["access_key"],
            secret_key=self.said["secret_key"],
            region="us-east-1",
        )

    def pids(self) -> dict[str, int]:
        """The processes as they are now (a killed one gets a new pid)."""
        connection = DataFolder(self.data).connection()
        assert connection is not None, "the stack is not running"
        return connection.pids


def up(data: Path) -> RunningStack:
    """Start a stack in the background and wait until it is ready."""
    done = subprocess.run(
        [*WA, "up", "--detach", "--json", "--data", str(data)], check=True, stdout=subprocess.PIPE, timeout=180
    )
    return RunningStack(data, json.loads(done.stdout))


def down(data: Path) -> None:
    """Stop a stack and everything it started."""
    subprocess.run([*WA, "down", "--data", str(data)], check=True, timeout=120, stdout=subprocess.DEVNULL)


def submission(**changes: Any) -> dict[str, Any]:
    """The main job: digits, two workers, SWA and EMA."""
    return {
        "recipe": DIGITS,
        "config": {"epochs": 12, "lr": 0.1},
        "scaling": {"num_workers": 2, "use_gpu": False},
        "checkpoint": {"every_steps": 20},
        "averages": [{"name": "swa", "rule": "swa:start_step=100"}, {"name": "ema", "rule": "ema:half_life=60"}],
        "seed": 0,
    } | changes


def kill(pid: int) -> None:
    """SIGKILL: no handler runs, nothing is flushed."""
    os.kill(pid, signal.SIGKILL)
