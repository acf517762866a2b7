"""A server of one file that cuts its answers short, or replaces the file in between."""

from __future__ import annotations

import base64
import hashlib
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterator


class CuttingServer(ThreadingHTTPServer):
    """Serves one body with ranges, but cuts some answers short and may replace the body in between.

    Args:
        bodies: what is served; the last one for ever, each other for one request.
        cut_at: how many bytes each of the first answers may have.
        is_lying: whether the digest promised is another's.
    """

    daemon_threads = True

    def __init__(self, bodies: list[bytes], *, cut_at: list[int], is_lying: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), CuttingHandler)
        self.bodies = bodies
        self.cut_at = cut_at
        self.is_lying = is_lying
        self.ranges: list[str | None] = []
        self.tokens: list[str | None] = []


class CuttingHandler(BaseHTTPRequestHandler):
    """Answers for `CuttingServer`."""

    server: CuttingServer
    protocol_version: ClassVar[str] = "HTTP/1.1"  # type: ignore[misc]

    def do_GET(self) -> None:
        """Serve the body, or the part of it that is asked for, or less."""
        body = self.server.bodies.pop(0) if len(self.server.bodies) > 1 else self.server.bodies[0]
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        self.server.tokens.append(self.headers["Authorization"])
        start = int(asked[6:-1]) if asked and self.headers["If-Range"] == etag else 0
        rest = body[start:]
        self.send_response(206 if start else 200)
        digest = hashlib.sha256(b"another" if self.server.is_lying else body).digest()
        self.send_header("ETag", etag)
        self.send_header("Repr-Digest", f"sha-256=:{base64.b64encode(digest).decode()}:")
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        cut = self.server.cut_at.pop(0) if self.server.cut_at else len(rest)
        self.wfile.write(rest[:cut])
        self.close_connection = cut < len(rest)

    def log_message(self, *_args: object) -> None:
        """Stay silent."""


@contextmanager
def cutting(*bodies: bytes, cut_at: tuple[int, ...] = (), is_lying: bool = False) -> Iterator[CuttingServer]:
    """A running `CuttingServer`."""
    server = CuttingServer(list(bodies), cut_at=list(cut_at), is_lying=is_lying)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(60)
