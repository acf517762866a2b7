"""A server like one on another machine: it takes large bodies and forgets them, and passes on all else.

`python -m benchmarks.forgetful PORT TARGET_PORT` stands before a real S3 server. What a store does with the bytes
of a checkpoint costs the trainer's machine nothing, unless it is the same machine; this one does not even copy
them out of the kernel: 10 ms of a processor for 200 MB. Small requests (records, listings) are answered by the
server behind it, so whatever commits is real. It checks no signature of what it forgets.
"""

from __future__ import annotations

import socket
import sys
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_LARGE_BYTES = 1 << 20
_HOP = {"expect", "transfer-encoding"}  # what is between two neighbours on the way
_ROOM = bytearray(1 << 20)  # nothing is written to it: the kernel drops what it is told to truncate
_UPLOAD = b"<InitiateMultipartUploadResult><UploadId>1</UploadId></InitiateMultipartUploadResult>"
_DONE = b"<CompleteMultipartUploadResult><ETag>1</ETag></CompleteMultipartUploadResult>"


class Forgetful(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer leaves in one piece
    target_port = 0

    def do_PUT(self) -> None:
        """Forget what is large or a part; create what is small."""
        left = int(self.headers.get("Content-Length", 0))
        large = int(self.headers.get("x-amz-decoded-content-length", left)) >= _LARGE_BYTES
        if not large and "uploadId=" not in self.path:
            self._pass_on()
            return
        if self._is_chunked:
            for _ in self._chunks():
                pass
        if left:
            left -= len(self.rfile.read(min(left, len(self.rfile.peek()))))  # what came along with the headers
        while left > 0 and (count := self.connection.recv_into(_ROOM, min(left, len(_ROOM)), socket.MSG_TRUNC)):
            left -= count
        self._answer(200, {"ETag": '"1"'}, b"")

    def do_POST(self) -> None:
        """Begin and end uploads in parts."""
        if "uploads" in self.path:
            self._answer(200, {}, _UPLOAD)
        elif "uploadId=" in self.path:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(200, {}, _DONE)
        else:
            self._pass_on()

    def handle_expect_100(self) -> bool:
        """Say at once that the body is wanted."""
        self.send_response_only(100)
        self.end_headers()
        self.wfile.flush()
        return True

    def _pass_on(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = b"".join(self._chunks()) if self._is_chunked else self.rfile.read(length)
        upstream = HTTPConnection("127.0.0.1", self.target_port)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        upstream.request(self.command, self.path, body=body or None, headers=headers)
        answer = upstream.getresponse()
        body = answer.read()
        # To HEAD the length is that of the object, which is not there.
        dropped = {"transfer-encoding"} | ({"content-length"} if self.command != "HEAD" else set())
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in dropped}
        self._answer(answer.status, kept, body)
        upstream.close()

    @property
    def _is_chunked(self) -> bool:
        return self.headers.get("Transfer-Encoding", "").lower() == "chunked"

    def _chunks(self) -> Iterator[bytes]:
        """The body as Arrow sends it, which says the length of each piece before it."""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    do_GET = do_HEAD = do_DELETE = _pass_on  # noqa: N815  named by `http.server`


def main() -> None:
    """Serve until the end."""
    Forgetful.target_port = int(sys.argv[2])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Forgetful).serve_forever()


if __name__ == "__main__":
    main()
