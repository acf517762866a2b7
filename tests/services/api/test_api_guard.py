"""Hostile connections, on real sockets in front of a real uvicorn, with both of its parsers."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx2
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.api.access.connections import MAX_HEAD_BYTES, patient
from services.api.access.guard import GuardLimits
from support.api import TOKEN, ApiRun, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.store.memory import MemoryStore

DEADLINE_S = 0.5
LIMITS = GuardLimits(body_deadline_s=DEADLINE_S, max_body_bytes=1 << 20)
AUTH = f"Authorization: Bearer {TOKEN}\r\n"


@pytest.fixture
def run(store: MemoryStore) -> ApiRun:
    """A run with weights that fill any buffer on the way."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.fold(body=bytes(64 << 20))
    return run


@pytest.fixture(params=[H11Protocol, HttpToolsProtocol])
def address(store: MemoryStore, request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """Where the API listens that has little patience; after the test it still answers."""
    with listening(store, request.param, deadline_s=DEADLINE_S) as url:
        yield urlsplit(url).hostname or "", urlsplit(url).port or 0
        assert httpx2.get(f"{url}/livez").status_code == 200


@contextmanager
def listening(store: MemoryStore, protocol: type[Any], *, deadline_s: float) -> Iterator[str]:
    """An API that waits `deadline_s` for a caller's progress."""
    limited = patient(protocol, head_deadline_s=deadline_s, read_deadline_s=deadline_s)
    with serving(store, token=TOKEN, guard=LIMITS, protocol=limited) as url:
        yield url


@contextmanager
def connected(address: tuple[str, int], text: str = "") -> Iterator[socket.socket]:
    """A connection on which `text` was sent."""
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(text.encode())
        yield connection


def post(path: str, content_type: str) -> str:
    """The beginning of a POST's head."""
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{AUTH}Content-Type: {content_type}\r\n"


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    received = b""
    try:
        while piece := connection.recv(1 << 16):
            received += piece
    except ConnectionResetError:
        pass
    return received


def dripping(connection: socket.socket, piece: bytes) -> None:
    """Send `piece` again and again, slowly and in the background, until the other side closes."""

    def drip() -> None:
        try:
            while True:
                connection.sendall(piece)
                time.sleep(0.02)
        except OSError:
            return

    threading.Thread(target=drip, daemon=True).start()


@pytest.mark.parametrize("sent", ["", "GET /livez HTTP/1.1\r\nHost: x\r\n"])
def test_a_connection_that_asks_nothing_is_closed(address: tuple[str, int], sent: str) -> None:
    """Bad input 9: a connection on which no request becomes whole is closed after the deadline."""
    with connected(address, sent) as connection:
        assert everything(connection) == b""


def test_a_dripping_head_is_cut_off(address: tuple[str, int]) -> None:
    """Bad input 9: a header that comes byte by byte does not hold its connection open."""
    with connected(address, "GET /livez HTTP/1.1\r\nHost: x\r\nX: ") as connection:
        dripping(connection, b"x")
        assert everything(connection) == b""


def test_a_dripping_second_request_is_cut_off(address: tuple[str, int]) -> None:
    """Bad input 9: having been answered once buys no patience."""
    with connected(address, "GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HTTP/1.1\r\nX: ") as connection:
        dripping(connection, b"x")
        assert everything(connection).count(b"HTTP/1.1 200") == 1


def test_a_head_without_an_end_is_cut_off(address: tuple[str, int]) -> None:
    """Bad input 7: a header is not collected in memory for as long as it comes."""
    with connected(address, "GET /livez HTTP/1.1\r\nHost: x\r\nX: ") as connection:
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            connection.sendall(b"x" * (256 * MAX_HEAD_BYTES))
        assert b" 200 " not in everything(connection)


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/runs/RUN:cancel", "/v1/runs/RUN:resume", "/v1/nothing", "/"])
def test_a_slow_body_holds_nothing(address: tuple[str, int], run: ApiRun, path: str) -> None:
    """Bad input 9: a body that drips ends with an answer, on every kind of route, and its connection with it."""
    head = (
        f"POST {path.replace('RUN', run.run_id)} HTTP/1.1\r\nHost: x\r\n{AUTH}Content-Type: application/json\r\n"
    )
    with connected(address, f"{head}Content-Length: 1000\r\n\r\n") as connection:
        dripping(connection, b" ")
        answer = everything(connection)

    reads_body = path in {"/v1/runs", "/v1/runs/RUN:resume"}
    assert answer.startswith(b"HTTP/1.1 ")
    assert (b" 408 " in answer.partition(b"\r\n")[0]) == reads_body
    assert answer.lower().count(b"connection: close") == 1


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/packages", "/v1/runs/RUN:cancel", "/v1/nothing"])
def test_an_endless_body_holds_nothing(address: tuple[str, int], run: ApiRun, path: str) -> None:
    """Bad input 8: chunks without an end are refused, or left unread, and the connection ends."""
    content_type = "application/zip" if path == "/v1/packages" else "application/json"
    head = post(path.replace("RUN", run.run_id), content_type)
    with connected(address, f"{head}Transfer-Encoding: chunked\r\n\r\n") as connection:
        dripping(connection, b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        answer = everything(connection)

    if path in {"/v1/runs", "/v1/packages"} and answer:  # a reset may overtake the answer
        assert answer.partition(b"\r\n")[0].split()[1] in {b"413", b"408"}


def test_a_caller_who_reads_nothing_is_cut_off(address: tuple[str, int], run: ApiRun) -> None:
    """A download that nobody takes does not hold its connection, or what it reads from the store."""
    request = f"GET /v1/runs/{run.run_id}/averages/swa/weights.safetensors HTTP/1.1\r\nHost: x\r\n{AUTH}\r\n"
    with connected(address, request) as connection:
        until_closed(connection, seconds=20)
        answer = everything(connection)

    assert answer.startswith(b"HTTP/1.1 200") or not answer  # a reset may take what was not read
    assert len(answer) < 64 << 20


def until_closed(connection: socket.socket, *, seconds: float) -> None:
    """Wait, without reading, until the other side has closed."""
    tcp_established, deadline = 1, time.monotonic() + seconds
    while time.monotonic() < deadline:
        if connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != tcp_established:
            return
        time.sleep(0.02)
    raise AssertionError("the connection is still open")


@pytest.mark.parametrize("protocol", [H11Protocol, HttpToolsProtocol])
def test_a_good_client_notices_nothing(store: MemoryStore, protocol: type[Any], run: ApiRun) -> None:
    """One connection serves many requests, and a long poll may take longer than a head."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    deadline_s = 3.0  # a good client may be kept from its work for a while
    with (
        listening(store, protocol, deadline_s=deadline_s) as url,
        httpx2.Client(base_url=url, headers=headers, timeout=30) as client,
    ):
        first = client.get(f"/v1/runs/{run.run_id}")
        etag = {"If-None-Match": first.headers["ETag"]}
        waited = client.get(f"/v1/runs/{run.run_id}?wait={deadline_s + 0.5}", headers=etag)
        answers = [client.get("/v1/runs").status_code for _ in range(10)]
        whole = client.get(f"/v1/runs/{run.run_id}/averages/swa/weights.safetensors")

    assert (waited.status_code, set(answers)) == (304, {200})
    assert len(whole.content) == 64 << 20


def test_an_answer_that_never_begins_is_given_up() -> None:
    """A route that waits without an end answers 503 `too_slow`, and the next request works."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from starlette.responses import JSONResponse

    from services.api.access.guard import Guard

    app = FastAPI()

    @app.get("/waits")
    async def waits() -> Any:
        import asyncio

        await asyncio.Event().wait()

    @app.get("/answers")
    async def answers() -> Any:
        return JSONResponse({})

    app.add_middleware(Guard, limits=GuardLimits(answer_deadline_s=2.5))
    with TestClient(app) as client:
        slow, good = client.get("/waits"), client.get("/answers")

    assert (slow.status_code, slow.json()["code"], good.status_code) == (503, "too_slow", 200)
    assert "Retry-After" in slow.headers
