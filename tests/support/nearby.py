"""A bucket in memory whose objects can also be had by HTTP, as S3's can; it counts which way was taken."""

from __future__ import annotations

from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from support.answering import answering
from wa_core import layout
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator


class NearbyStore(MemoryStore):
    """`num_asked` files came by HTTP, cut short after `cut_after` bytes; the adapter streamed the others."""

    def __init__(self) -> None:
        super().__init__()
        self.address = "http://127.0.0.1:9"  # where nothing listens
        self.num_asked = self.num_streamed = 0
        self.cut_after: int | None = None

    def nearby_url(self, key: str, *, expires_s: int) -> str:
        """The object's address."""
        return f"{self.address}/{key}?expires={expires_s}"

    def stream(self, key: str, start: int = 0, *, end: int | None = None) -> Iterator[bytes]:
        """Read, and count."""
        self.num_streamed += key.startswith(layout.RUNS)  # the probe of a store streams, too
        return super().stream(key, start=start, end=end)


@contextmanager
def listening(store: NearbyStore) -> Iterator[None]:
    """Let the store's objects be had at their addresses."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            store.num_asked += 1
            body = store.get(urlsplit(self.path).path[1:])
            wanted = self.headers.get("Range", "").removeprefix("bytes=")
            start, end = 0, len(body)
            if wanted:
                first, last = wanted.split("-")
                start, end = int(first), int(last) + 1
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(end - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(body)}")
            self.end_headers()
            self.wfile.write(body[start:end][: store.cut_after])
            if store.cut_after is not None:
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with answering(Handler) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # callers that leave are no news
        store.address = f"http://127.0.0.1:{server.server_port}"
        yield
