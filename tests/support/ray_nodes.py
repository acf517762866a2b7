"""A Ray cluster of several nodes on this machine, each a raylet of its own that can be killed alone.

Nodes are started by `ray start`, with a token and on free ports. They have the machine's own address, since Ray
keeps a cluster on the loopback address to one node. The head's control store looks after its nodes four times a
second, so that a killed one is missed within a second or two.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Self

from services.stack import ray_head, seaweedfs
from support.descendants import descendants, is_alive
from support.patience import eventually

_WATCHFUL = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "250",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}


class RayNodes:
    """Starts a head; a context manager whose end leaves no process and no folder.

    Args:
        cpus_each: how many processors each node says that it has.
    """

    def __init__(self, *, cpus_each: int = 1) -> None:
        self._cpus_each = cpus_each
        # Below /tmp: a unix socket's path must stay short.
        self._folder = Path(tempfile.mkdtemp(prefix="wa-nodes-", dir="/tmp"))
        ports = seaweedfs.free_ports(ray_head.NUM_PORTS)
        self._config = ray_head.RayHeadConfig(temp_dir=self._folder, ports=ports, token="ab" * 32)
        self._nodes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        head = [each for each in ray_head.argv(self._config) if not each.startswith("--num-cpus")]
        self._start([*head, f"--num-cpus={self._cpus_each}"])
        eventually(lambda: ray_head.answers(self._config), what="the head's start")
        return self

    def __exit__(self, *_: object) -> None:
        pids = {pid for node in self._nodes for pid in (node.pid, *descendants(node.pid))}
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node in self._nodes:
            node.wait()
        eventually(lambda: not any(map(is_alive, pids)), what="the end of all nodes")
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to join."""
        told = ray_head.environment(self._config)
        told.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
        return {**told, "WA_RAY_ADDRESS": self._config.address}

    def add(self) -> int:
        """Start one more node, and return its number (from 1; the head is 0)."""
        ports = seaweedfs.free_ports(6)
        names = ("object-manager-port", "node-manager-port", "dashboard-agent-listen-port")
        names += ("dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port")
        argv = [ray_head.argv(self._config)[0], "start", "--block", f"--address={self._config.address}"]
        argv += [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
        argv += ["--include-log-monitor=false", "--disable-usage-stats"]
        number = len(self._nodes)
        self._start([*argv, f"--num-cpus={self._cpus_each}", "--object-store-memory=100000000"])
        eventually(lambda: "Ray runtime started" in self.log_of(number), what="the node's start")
        return number

    def log_of(self, number: int) -> str:
        """What a node's `ray start` has said."""
        return (self._folder / f"node-{number}.log").read_text()

    def kill(self, number: int) -> None:
        """SIGKILL of a node's raylet: what a machine's loss looks like to all others."""
        below = descendants(self._nodes[number].pid)
        os.kill(
            next(pid for pid, line in below.items() if "/raylet/raylet" in line.split(" ", 1)[0]), signal.SIGKILL
        )

    def _start(self, argv: list[str]) -> None:
        path = self._folder / f"node-{len(self._nodes)}.log"
        with path.open("wb") as log:
            environment = {**os.environ, **self.environment, **_WATCHFUL}
            self._nodes.append(subprocess.Popen(argv, env=environment, stdout=log, stderr=log))
