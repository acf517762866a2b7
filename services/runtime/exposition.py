"""The small HTTP side of a worker: `/livez`, `/readyz` and `/metrics`, for probes and Prometheus; no run data.

It knows a way to ask how long ago the worker last got on; nothing of its work. It answers from a thread of its
own, so also while a large checkpoint is being folded.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app

from wa_core.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIEnvironment

STUCK_AFTER_S = 60.0


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
        """Probes come every few seconds; they are not worth a line each."""


@contextmanager
def exposed(host: str, port: int, *, variable: str, idle_s: Callable[[], float]) -> Iterator[int]:
    """Answer on `host` and `port` (0: any free one) inside the block; yields the port.

    Args:
        host: the address to listen on.
        port: the port.
        variable: the setting that names the port.
        idle_s: how many seconds ago the worker last got on with anything.

    Raises:
        ConfigurationError: the port cannot be had.
    """
    try:
        server = make_server(host, port, _app(idle_s), server_class=WSGIServer, handler_class=_Quiet)
    except OSError as error:
        raise ConfigurationError(
            f"port {port} of {host} cannot be had ({error.strerror or error}); choose another {variable}"
        ) from error
    thread = threading.Thread(target=server.serve_forever, name="exposition", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _app(idle_s: Callable[[], float]) -> Callable[[WSGIEnvironment, StartResponse], Iterable[bytes]]:
    metrics = make_wsgi_app()

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            found: Iterable[bytes] = metrics(environ, start_response)
            return found
        status, text = _answer(path, idle_s())
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(text)))])
        return [text]

    return app


def _answer(path: str, idle_s: float) -> tuple[str, bytes]:
    if path == "/livez":
        return "200 OK", b"ok\n"
    if path == "/readyz" and idle_s < STUCK_AFTER_S:
        return "200 OK", b"ready\n"
    if path == "/readyz":
        return "503 Service Unavailable", f"nothing has got on for {idle_s:.0f} s; is the store away?\n".encode()
    return "404 Not Found", b"there are /livez, /readyz and /metrics\n"
