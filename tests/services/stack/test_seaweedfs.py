from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import pytest

from services.stack import seaweedfs
from services.stack.seaweedfs import SeaweedConfig
from support.seaweed import running_seaweed
from wa_core.errors import ConfigurationError, StoreAuthError, StoreUnavailableError

if TYPE_CHECKING:
    from support.seaweed import Seaweed

LISTENING = "0A"


def listening_addresses(pid: int) -> set[tuple[str, int]]:
    """(hexadecimal address, port) of every TCP socket on which the process listens, IPv4 and IPv6."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(str(link.readlink()))
        except FileNotFoundError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and f"socket:[{fields[9]}]" in inodes:
                address, _, port = fields[1].partition(":")
                found.add((address, int(port, 16)))
    return found


def test_listens_on_loopback_and_its_own_ports_only(seaweed: Seaweed) -> None:
    """No socket of the server is reachable from another machine, or on a port that was not chosen for it."""
    assert seaweed.process is not None
    found = listening_addresses(seaweed.process.pid)

    assert {address for address, _ in found} == {"0100007F"}  # 127.0.0.1
    assert seaweed.config.ports[0] in {port for _, port in found}
    assert {port for _, port in found} <= set(seaweed.config.ports)


def test_nothing_is_served_without_credentials(seaweed: Seaweed) -> None:
    """Over HTTP no port gives out, takes or removes an object without a signature; the filer's in particular."""
    store = seaweed.new_store()
    store.put("secret/weights", b"the weights")
    paths = [f"/{store.bucket}/secret/weights", f"/buckets/{store.bucket}/secret/weights"]

    for port in seaweed.config.ports:
        for path in paths:
            for method in ("GET", "PUT", "DELETE"):
                try:
                    answer = httpx2.request(method, f"http://127.0.0.1:{port}{path}", content=b"x", timeout=2)
                except httpx2.TransportError:
                    continue  # gRPC, or not listening
                assert answer.status_code >= 400
                assert b"the weights" not in answer.content

    assert store.get("secret/weights") == b"the weights"
    assert [info.key for info in store.list("")] == ["secret/weights"]


def test_another_secret_is_refused(seaweed: Seaweed) -> None:
    """Credentials are checked: the right key with another secret gets nowhere."""
    impostor = seaweedfs.open_store(replace(seaweed.config, secret_key="another-secret"))

    with pytest.raises(StoreAuthError):
        list(impostor.list(""))


def test_state_survives_a_clean_stop_and_other_ports(tmp_path: Path) -> None:
    """SIGTERM ends the server with 0 within 10 s (F28); on other ports and credentials nothing is lost."""
    with running_seaweed(tmp_path) as server:
        store = server.new_store()
        store.put("kept", b"body")
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=10) == 0
        seaweedfs.remove_sockets(server.config)

        server.config = replace(
            server.config, ports=seaweedfs.free_ports(seaweedfs.NUM_PORTS), secret_key="rolled-over-secret"
        )
        server.start()

        again = seaweedfs.open_store(replace(server.config, bucket=store.bucket))
        assert again.get("kept") == b"body"
        again.put("new", b"")


def test_a_killed_server_leaves_no_socket_behind(tmp_path: Path) -> None:
    """After a SIGKILL its Unix sockets can be swept, and it starts again on the same ports."""
    places = Path("/tmp")  # noqa: S108  where SeaweedFS puts them
    before = {*places.glob("seaweedfs-*.sock")}
    with running_seaweed(tmp_path) as server:
        server.kill()
        seaweedfs.remove_sockets(server.config)
        sockets = {*places.glob("seaweedfs-*.sock")} - before
        left = [path for path in sockets if names_one_of(path, server.config.ports)]

        server.start()

    assert left == []


def names_one_of(path: Path, ports: tuple[int, ...]) -> bool:
    """Whether the socket's name ends with one of these ports."""
    return int(path.stem.rpartition("-")[2]) in ports


def test_waiting_ends_when_the_process_does(tmp_path: Path) -> None:
    """A server that died while starting is not waited for, and the message says where to look."""
    started = time.monotonic()

    with pytest.raises(StoreUnavailableError, match="see its log"):
        seaweedfs.wait_until_ready(config_in(tmp_path), timeout_s=60, is_alive=lambda: False)

    assert time.monotonic() - started < 30


def test_waiting_ends_when_the_time_is_up(tmp_path: Path) -> None:
    """A server that never answers is given up on; the message holds the last answer."""
    with pytest.raises(StoreUnavailableError, match=r"not ready after 0.1 s: .* did not answer"):
        seaweedfs.wait_until_ready(config_in(tmp_path), timeout_s=0.1, is_alive=lambda: True)


def test_secrets_are_in_the_environment_alone(tmp_path: Path) -> None:
    """Neither the command line, which every user can read, nor the printed config holds the secret."""
    config = config_in(tmp_path)

    assert not any("secret-key" in argument for argument in seaweedfs.argv(config))
    assert "secret-key" not in repr(config)
    assert seaweedfs.environment(config)["AWS_SECRET_ACCESS_KEY"] == "secret-key"


def test_ports_are_free_and_different() -> None:
    """Ports chosen together differ and lie below those that outgoing connections take."""
    ports = seaweedfs.free_ports(50)

    assert len(set(ports)) == 50
    assert max(ports) < 32_768


def test_too_few_ports_are_refused(tmp_path: Path) -> None:
    """A config with another number of ports is refused at once."""
    with pytest.raises(ConfigurationError, match="10 ports, not 2"):
        SeaweedConfig(data_dir=tmp_path, ports=(1, 2), access_key="a", secret_key="b")


def config_in(folder: Path) -> SeaweedConfig:
    """A config for which nothing runs."""
    return SeaweedConfig(
        data_dir=folder,
        ports=seaweedfs.free_ports(seaweedfs.NUM_PORTS),
        access_key="access-key",
        secret_key="secret-key",
    )
