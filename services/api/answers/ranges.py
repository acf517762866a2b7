"""Range requests (RFC 9110, section 14) for one known representation. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ONE_RANGE = re.compile(r"bytes=\s*(\d{0,19})-(\d{0,19})\s*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` up to, not including, `end` of a representation of `size_bytes`."""

    start: int
    end: int
    size_bytes: int

    @property
    def length(self) -> int:
        """How many bytes it covers."""
        return self.end - self.start

    @property
    def content_range(self) -> str:
        """The `Content-Range` of a 206."""
        return f"bytes {self.start}-{self.end - 1}/{self.size_bytes}"


class UnsatisfiableRangeError(ValueError):
    """The one range asked for has no byte in the representation: 416."""


def requested_span(header: str | None, *, size_bytes: int) -> Span | None:
    """The part a `Range` header asks for, or None to send the whole.

    Several ranges, other units and anything malformed are answered with the whole, as the RFC allows: a server
    that joins 10,000 ranges works for its attackers.

    Raises:
        UnsatisfiableRangeError: one well-formed range, outside the representation.
    """
    found = _ONE_RANGE.fullmatch(header or "")
    if found is None or not any(found.groups()):
        return None
    first, last = found.groups()
    if not first:
        start, end = max(0, size_bytes - int(last)), size_bytes
    else:
        start, end = int(first), min(int(last) + 1, size_bytes) if last else size_bytes
        if last and int(last) < start:
            return None
    if start >= end:
        raise UnsatisfiableRangeError(f"{header} of {size_bytes} bytes")
    return Span(start, end, size_bytes)


def etag_matches(header: str | None, etag: str) -> bool:
    """Whether an `If-None-Match` list holds `etag`, by weak comparison."""
    if header is None:
        return False
    offered = [part.strip() for part in header.split(",")]
    return "*" in offered or any(part.removeprefix("W/") == etag for part in offered)


def range_still_applies(if_range: str | None, etag: str) -> bool:
    """Whether `If-Range` lets the range stand: by strong comparison; a date never does."""
    return if_range is None or if_range.strip() == etag
