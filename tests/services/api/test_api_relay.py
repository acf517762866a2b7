"""Downloads that go past the API from the store's connection to the caller's, on real sockets."""

from __future__ import annotations

import random
import socket
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx2
import pytest

from services.api.access.connections import patient
from support.api import ApiRun, serving
from support.nearby import NearbyStore, listening

if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE_S = 0.5
BODY = random.Random(0).randbytes(5_000_001)


@pytest.fixture
def bucket() -> Iterator[NearbyStore]:
    """A bucket whose objects can be had by HTTP."""
    store = NearbyStore()
    with listening(store):
        yield store


@pytest.fixture
def run(bucket: NearbyStore) -> ApiRun:
    """A run with an average that can be downloaded."""
    run = ApiRun(bucket).start()
    run.checkpoint(20)
    run.fold(body=BODY)
    return run


@pytest.fixture
def http(bucket: NearbyStore) -> Iterator[httpx2.Client]:
    """A client of the API over the bucket, with one connection."""
    protocol = patient(read_deadline_s=DEADLINE_S)
    with serving(bucket, protocol=protocol) as url, httpx2.Client(base_url=url, trust_env=False) as client:
        yield client
        assert client.get("/livez").status_code == 200


def path_of(run: ApiRun) -> str:
    """Where its weights are."""
    return f"/v1/runs/{run.run_id}/averages/swa/weights.safetensors"


def ways(store: NearbyStore) -> tuple[int, int]:
    """How often files were had by HTTP, and through the adapter."""
    return store.num_asked, store.num_streamed


def test_a_download_goes_past_the_api(http: httpx2.Client, run: ApiRun, bucket: NearbyStore) -> None:
    """The bytes are the store's, several times over one connection, and the API's metrics count them."""
    bodies = [http.get(path_of(run)).content for _ in range(3)]

    assert bodies == [BODY] * 3
    assert ways(bucket) == (3, 0)
    sent = next(line for line in http.get("/metrics").text.splitlines() if line.startswith("wa_api_sent_bytes_t"))
    assert float(sent.split()[1]) >= 3 * len(BODY)


@pytest.mark.parametrize(("start", "last"), [(0, 0), (1, 70_000), (70_000, len(BODY) - 1), (0, len(BODY) - 1)])
def test_a_range_goes_past_the_api(
    http: httpx2.Client, run: ApiRun, bucket: NearbyStore, start: int, last: int
) -> None:
    """A range is 206 with just its bytes, however few they are."""
    answer = http.get(path_of(run), headers={"Range": f"bytes={start}-{last}"})

    assert answer.status_code == 206
    assert answer.headers["Content-Range"] == f"bytes {start}-{last}/{len(BODY)}"
    assert answer.content == BODY[start : last + 1]
    assert ways(bucket) == (1, 0)


@pytest.mark.parametrize("cut_after", [0, 1, 100_000, 4_999_999])
def test_f30_a_store_that_breaks_off_is_read_on(
    http: httpx2.Client, run: ApiRun, bucket: NearbyStore, cut_after: int
) -> None:
    """F30: when the store's connection ends early, the rest comes from there on, in the same answer."""
    bucket.cut_after = cut_after

    assert http.get(path_of(run)).content == BODY
    assert ways(bucket) == (1, 1)


def test_a_store_that_cannot_be_reached_so_is_read_otherwise(http: httpx2.Client, run: ApiRun) -> None:
    """Where the address leads nowhere, the download is what it was."""
    store = run.store
    assert isinstance(store, NearbyStore)
    store.address = "http://127.0.0.1:9"

    assert http.get(path_of(run)).content == BODY
    assert ways(store) == (0, 1)


def test_requests_sent_at_once_are_answered_in_order(http: httpx2.Client, run: ApiRun) -> None:
    """Two downloads and a question that are asked at once on one connection are answered whole, in order."""
    address = urlsplit(str(http.base_url))
    asked = f"GET {path_of(run)} HTTP/1.1\r\nHost: x\r\n\r\n" * 2
    asked += "GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(asked.encode())
        answer = b"".join(iter(lambda: connection.recv(1 << 20), b""))

    assert answer.count(BODY) == 2
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 3


def test_a_caller_that_takes_nothing_is_cut_off(http: httpx2.Client, run: ApiRun) -> None:
    """Whoever asks for more than fits into buffers and reads nothing loses the connection; the API goes on."""
    run.fold(body=bytes(64 << 20))
    address = urlsplit(str(http.base_url))
    with socket.create_connection((address.hostname, address.port), timeout=20) as connection:
        connection.sendall(f"GET {path_of(run)}?at=latest HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        deadline = time.monotonic() + 20
        while not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) and time.monotonic() < deadline:
            time.sleep(0.02)

    assert time.monotonic() < deadline
