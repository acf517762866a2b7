"""The local Ray head: its command line, environment and readiness. Pure but for the readiness check.

Everything binds to the loopback address and asks for a token. Ray itself is not imported here.
"""

from __future__ import annotations

import os
import socket
import sysconfig
from dataclasses import dataclass
from pathlib import Path

OBJECT_STORE_BYTES = 200_000_000  # weights never travel through Ray's object store
NUM_PORTS = 8


@dataclass(frozen=True, slots=True)
class RayHeadConfig:
    """What a head needs. `ports` are `NUM_PORTS` free ones; `temp_dir` must be short (unix socket paths)."""

    temp_dir: Path
    ports: tuple[int, ...]
    token: str

    @property
    def address(self) -> str:
        """What a driver passes to `ray.init`."""
        return f"127.0.0.1:{self.ports[0]}"


def num_cpus() -> int:
    """The CPUs that Ray may hand out: two workers train even on a machine with one core."""
    return max(2, os.cpu_count() or 1)


def argv(config: RayHeadConfig) -> list[str]:
    """The command line; `--block` keeps Ray's processes below one that can be watched."""
    gcs, object_manager, node_manager, agent, agent_grpc, runtime_env, metrics, _ = config.ports
    return [
        str(Path(sysconfig.get_path("scripts")) / "ray"),
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--port={gcs}",
        f"--object-manager-port={object_manager}",
        f"--node-manager-port={node_manager}",
        f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--runtime-env-agent-port={runtime_env}",
        f"--metrics-export-port={metrics}",
        "--include-dashboard=false",
        "--include-log-monitor=false",
        "--disable-usage-stats",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--num-cpus={num_cpus()}",
        f"--temp-dir={config.temp_dir}",
    ]


def environment(config: RayHeadConfig) -> dict[str, str]:
    """What the head, every driver and thereby every worker must have in its environment.

    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 is what keeps Ray on the loopback address: otherwise it replaces
    127.0.0.1 by the machine's own address and listens on all interfaces.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": config.token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "AUTOSCALER_METRIC_PORT": str(config.ports[7]),
    }


def answers(config: RayHeadConfig) -> bool:
    """Whether the control store and the node manager accept connections; the second starts last."""
    return all(_accepts(port) for port in (config.ports[0], config.ports[2]))


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return True
    except OSError:
        return False
