"""A stored file as the store itself sends it: a connection on which its bytes are under way.

It knows HTTP and addresses; neither stores nor callers. It is a short cut: whenever something is not as expected,
there is none, and the way through the store's adapter is taken, which tries again and says what is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

if TYPE_CHECKING:
    import socket

    from services.api.answers.ranges import Span

_DEADLINE_S = 5.0
_MOST_READ_AHEAD = 64 << 10  # more than what is buffered while the head is read


@dataclass(frozen=True, slots=True)
class Origin:
    """The bytes that were read along with the answer's head, and the connection on which the rest will come."""

    first: bytes
    connection: HTTPConnection

    @property
    def socket(self) -> socket.socket:
        """Where the rest comes."""
        return self.connection.sock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()


def open_origin(url: str, span: Span) -> Origin | None:
    """Ask for a part of a file; None when it does not come, or not directly and in the clear."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None or _has_proxy(parts.hostname):
        return None
    connection = HTTPConnection(parts.hostname, parts.port, timeout=_DEADLINE_S)
    try:
        first = _first_bytes(connection, f"{parts.path}?{parts.query}", span)
    except (OSError, HTTPException):
        first = None
    if first is None:
        connection.close()
        return None
    connection.sock.settimeout(0)
    return Origin(first, connection)


def _has_proxy(host: str) -> bool:
    return "http" in getproxies() and not proxy_bypass(host)


def _first_bytes(connection: HTTPConnection, target: str, span: Span) -> bytes | None:
    is_whole = span.length == span.size_bytes
    wanted = {} if is_whole else {"Range": f"bytes={span.start}-{span.end - 1}"}
    connection.request("GET", target, headers=wanted)
    answer = connection.getresponse()
    status = HTTPStatus.OK if is_whole else HTTPStatus.PARTIAL_CONTENT
    is_as_wanted = answer.status == status and answer.length == span.length and not answer.will_close
    if not is_as_wanted or answer.getheader("Content-Range", span.content_range) != span.content_range:
        return None
    return answer.read1(_MOST_READ_AHEAD)  # what is buffered, if anything is: the socket has the rest
