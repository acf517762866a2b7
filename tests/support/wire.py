"""HTTP/1.1 as far as a proxy between an S3 client and its server needs it: heads, and how long bodies are.

Knows no faults and opens no connections. Bodies pass through in pieces, never whole.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PIECE_BYTES = 256 << 10
_NO_BODY = {204, 304}


class BrokenMessageError(Exception):
    """The other side ended, or talked something else, in the middle of a message."""


@dataclass(frozen=True, slots=True)
class Head:
    """A start line and the headers, both as they came; `fields` by lower-case name."""

    start: str
    lines: tuple[str, ...]
    fields: dict[str, str]

    def encoded(self, *, without: str = "") -> bytes:
        """The bytes to send on, but for one header."""
        kept = [line for line in self.lines if line.partition(":")[0].lower() != without]
        return "\r\n".join([self.start, *kept, "", ""]).encode("latin-1")

    @property
    def size_bytes(self) -> int | None:
        """What `Content-Length` says; None for a chunked body or one that ends with the connection."""
        said = self.fields.get("content-length")
        return None if said is None else int(said)

    @property
    def is_chunked(self) -> bool:
        """Whether the body comes in chunks."""
        return "chunked" in self.fields.get("transfer-encoding", "")

    @property
    def is_last(self) -> bool:
        """Whether the connection ends after this message."""
        return self.fields.get("connection", "").lower() == "close"

    @property
    def status(self) -> int:
        """Of a response."""
        return int(self.start.split()[1])


@dataclass(frozen=True, slots=True)
class Call:
    """What a request asks of an S3 server (path style).

    `operation` is the method, or ``LIST``, or ``CREATE`` for a PUT on condition that the key is free. `is_part`
    says that it belongs to a multipart upload, `is_conditional` that it carries that condition.
    """

    operation: str
    key: str
    is_part: bool = False
    is_conditional: bool = False

    @classmethod
    def of(cls, head: Head) -> Call:
        """Read the start line and what else matters."""
        method, target, _ = head.start.split(" ", 2)
        parts = urlsplit(target)
        query = parse_qs(parts.query, keep_blank_values=True)
        if "list-type" in query:
            return cls("LIST", query.get("prefix", [""])[0])
        is_conditional = "if-none-match" in head.fields
        return cls(
            operation="CREATE" if is_conditional and method == "PUT" else method,
            key=unquote(parts.path.lstrip("/").partition("/")[2]),
            is_part=not {"uploads", "uploadId"}.isdisjoint(query),
            is_conditional=is_conditional,
        )


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """The next message's head; None when the other side has ended in between two messages.

    Raises:
        BrokenMessageError: it ended in the middle of one.
    """
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise BrokenMessageError("a head was cut") from None
        return None
    start, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Head(start, tuple(lines), fields)


def has_body(response: Head, *, operation: str) -> bool:
    """Whether a response has a body at all."""
    return operation != "HEAD" and response.status not in _NO_BODY


async def body_of(head: Head, reader: asyncio.StreamReader, *, is_response: bool) -> AsyncIterator[bytes]:
    """The body as it comes, framing included, so that it can be sent on as it is.

    Raises:
        BrokenMessageError: the other side ended too early.
    """
    try:
        if head.is_chunked:
            async for piece in _chunks(reader):
                yield piece
        elif head.size_bytes is not None:
            left = head.size_bytes
            while left:
                piece = await reader.read(min(left, PIECE_BYTES))
                if not piece:
                    raise BrokenMessageError(f"a body ended {left} bytes early")
                left -= len(piece)
                yield piece
        elif is_response:
            while piece := await reader.read(PIECE_BYTES):
                yield piece
    except asyncio.IncompleteReadError:
        raise BrokenMessageError("a chunked body was cut") from None


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        yield line + await reader.readexactly(size + 2) if size else line
        if not size:
            while (trailer := await reader.readuntil(b"\r\n")) != b"\r\n":
                yield trailer
            yield trailer
            return
