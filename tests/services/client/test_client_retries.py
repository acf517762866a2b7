"""What a client sends again, and what it does not."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from services.client import ApiError, Client, ServiceUnreachableError
from services.client.retries import Patience
from support.api import submission
from support.command import RUN_ID, run_resource

if TYPE_CHECKING:
    from collections.abc import Iterator


class StumblingServer(ThreadingHTTPServer):
    """Answers the first requests with `stumbles`, (status, headers) each, 0 for a cut connection; then well."""

    daemon_threads = True

    def __init__(self, stumbles: list[tuple[int, dict[str, str]]]) -> None:
        super().__init__(("127.0.0.1", 0), StumblingHandler)
        self.stumbles = stumbles
        self.keys: list[str | None] = []
        self.at: list[float] = []


class StumblingHandler(BaseHTTPRequestHandler):
    """Answers for `StumblingServer`."""

    server: StumblingServer

    def do_GET(self) -> None:
        """Stumble, or show a run."""
        self.server.keys.append(self.headers["Idempotency-Key"])
        self.server.at.append(time.monotonic())
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, headers = self.server.stumbles.pop(0) if self.server.stumbles else (200, {})
        if status == 0:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        document = run_resource() if status == 200 else {"detail": "stumbled", "code": "stumbled"}
        self.wfile.write(json.dumps(document).encode())

    do_POST = do_GET  # noqa: N815  the name that the base class calls

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@contextmanager
def stumbling(*stumbles: tuple[int, dict[str, str]]) -> Iterator[tuple[StumblingServer, Client]]:
    """A running `StumblingServer`, and a client of it."""
    server = StumblingServer(list(stumbles))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        with Client(f"http://127.0.0.1:{server.server_address[1]}", patience_s=20) as client:
            yield server, client
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("status", [0, 429, 502, 503, 504])
def test_reading_is_tried_again(status: int) -> None:
    """A GET that met a cut connection, a proxy without a service or a busy service is sent again."""
    with stumbling((status, {}), (status, {})) as (server, client):
        assert client.run(RUN_ID).run_id == RUN_ID
        assert len(server.at) == 3


@pytest.mark.parametrize("status", [400, 404, 409, 500])
def test_what_cannot_succeed_is_not_tried_again(status: int) -> None:
    """A refusal is told at once."""
    with stumbling((status, {})) as (server, client), pytest.raises(ApiError):
        client.run(RUN_ID)

    assert len(server.at) == 1


def test_a_submission_keeps_its_key_over_tries() -> None:
    """Submitting is sent again with the key of the first try, one that the client makes itself."""
    with stumbling((0, {}), (409, {"Retry-After": "0"}), (503, {})) as (server, client):
        client.submit(submission())
        client.submit(submission())

    first, *again, other = server.keys
    assert first is not None
    assert set(again) == {first}
    assert other not in {None, first}


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume"])
def test_a_wish_is_sent_once(verb: str) -> None:
    """What has an effect each time and no key is never sent twice: the caller decides."""
    with stumbling((0, {})) as (server, client), pytest.raises(ServiceUnreachableError):
        getattr(client, verb)(RUN_ID)

    assert len(server.at) == 1


def test_retry_after_is_kept_to() -> None:
    """The service says in seconds or as a date when to come back, and that is when the client comes."""
    date = formatdate(time.time() + 3, usegmt=True)
    with stumbling((503, {"Retry-After": "1"}), (503, {"Retry-After": date})) as (server, client):
        client.run(RUN_ID)

        came_at = time.time()

    first, second, _ = server.at
    assert second - first >= 1
    assert came_at >= parsedate_to_datetime(date).timestamp() - 0.1


def test_a_retry_after_beyond_the_patience_is_told_at_once() -> None:
    """Waiting that would be in vain is not done; the error says how long it would have been."""
    with stumbling((503, {"Retry-After": "3600"})) as (server, client), pytest.raises(ApiError) as refused:
        client.run(RUN_ID)

    assert refused.value.retry_after_s == 3600
    assert len(server.at) == 1


def test_waits_grow_and_differ_between_clients() -> None:
    """Waits double up to a limit, and jitter keeps a crowd of clients from coming back together."""
    waits = [_waits() for _ in range(8)]

    assert len({tuple(each) for each in waits}) == 8
    for each in waits:
        assert 0.05 <= each[0] <= 0.1
        assert 1.0 <= each[-1] <= 2.0


def _waits() -> list[float]:
    patience = Patience(60)
    return [patience.wait_s_after(ServiceUnreachableError("away")) for _ in range(7)]
