from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import httpx2
import pytest

from support.api import DIGITS, TOKEN
from support.patience import eventually
from support.ports import answered, free_port
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


NUM_ASKING = 8


@contextmanager
def api_process(data: Path, log: Path, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`python -m services.api` on a local store, and its address once it answers."""
    port = free_port()
    variables = {"WA_STORE_URL": f"file://{data}", "WA_API_PORT": str(port), "WA_TOKEN": TOKEN, **environment}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.api"], env=os.environ | variables, stdout=output, stderr=output
        )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(30)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The folder of a local store."""
    LocalStore(tmp_path / "bucket")
    return tmp_path / "bucket"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_told_to_stop(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Fault F28: it ends with status 0 within 10 s; a stream in flight ends whole; no secret is logged."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Accept": "text/event-stream"}
    with api_process(data, tmp_path / "log") as (process, url):
        eventually(lambda: answered(f"{url}/readyz").is_success, what="that it is ready")
        ready = answered(f"{url}/readyz")
        submitted = httpx2.post(f"{url}/v1/runs", json={"recipe": DIGITS}, headers=headers)
        with httpx2.stream("GET", f"{url}{submitted.headers['Location']}/events", headers=headers) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            stopped_at = time.monotonic()
            process.send_signal(number)
            rest = list(lines)
        status = process.wait(30)
        took_s = time.monotonic() - stopped_at

    assert (ready.status_code, submitted.status_code, status) == (200, 202, 0)
    assert (first, rest[-1]) == ("event: submitted", "")
    assert took_s < 10
    assert "server" not in ready.headers
    assert TOKEN not in (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_taken_port_ends_it(data: Path, tmp_path: Path) -> None:
    """When the port is taken, the process ends with a failure and says so in one line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with api_process(data, tmp_path / "log", WA_API_PORT=port) as (process, _):
            status = process.wait(60)

    assert status not in {0, None}
    assert "address already in use" in (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("variables", [{"WA_STORE_URL": "ftp://x"}, {"WA_API_PORT": "x"}])
def test_wrong_settings_end_it(data: Path, tmp_path: Path, variables: dict[str, str]) -> None:
    """Settings that cannot be are named on stderr as they are set, without a traceback."""
    with api_process(data, tmp_path / "log", **variables) as (process, _):
        status = process.wait(60)

    text = (tmp_path / "log").read_text()
    assert status == 1
    assert next(iter(variables)) in text
    assert "Traceback" not in text


def test_an_endless_body_is_cut_off(data: Path, tmp_path: Path) -> None:
    """Bad input 8: a chunked body without an end answers 413 after 1 MiB, and the next request works."""
    with api_process(data, tmp_path / "log") as (_, url):
        answered(f"{url}/livez")
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            head = f"POST /v1/runs HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\n"
            head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
            connection.sendall(head.encode())
            chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
            answer = b""
            for _ in range(64):
                try:
                    connection.sendall(chunk)
                except OSError:
                    break
            while data_read := _receive(connection):
                answer += data_read
        after = answered(f"{url}/livez")

    assert answer.startswith(b"HTTP/1.1 413")
    assert after.status_code == 200


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except OSError:
        return b""


def test_nothing_that_was_asked_is_cut_off(data: Path, tmp_path: Path) -> None:
    """F28: told to stop under load, it answers whatever comes on connections that it has kept open."""
    cut: list[httpx2.HTTPError] = []
    asking = threading.Barrier(NUM_ASKING + 1)

    def ask(url: str) -> None:
        with httpx2.Client(base_url=url, trust_env=False, timeout=30) as http, suppress(httpx2.ConnectError):
            http.get("/livez")
            asking.wait(60)
            while not cut:
                try:
                    http.get("/livez").raise_for_status()
                except httpx2.ConnectError:
                    raise  # nobody listens any more
                except httpx2.HTTPError as error:
                    cut.append(error)

    with api_process(data, tmp_path / "log") as (process, url):
        answered(f"{url}/livez")
        with ThreadPoolExecutor(NUM_ASKING) as threads:
            asked = [threads.submit(ask, url) for _ in range(NUM_ASKING)]
            asking.wait(60)
            process.send_signal(signal.SIGTERM)
            status = process.wait(30)
        for each in asked:
            each.result()

    assert (status, cut) == (0, [])
