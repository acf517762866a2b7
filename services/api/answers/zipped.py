"""A zip written while it is sent: small files whole, and one large one as it comes from the store.

It keeps no more than a chunk. Its files are stored, not compressed (weights do not shrink), with fixed times, so
that the same content is the same zip.
"""

from __future__ import annotations

import io
import zipfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_EPOCH = (1980, 1, 1, 0, 0, 0)
_READABLE = 0o644 << 16


def zip_stream(
    small: Mapping[str, bytes], *, name: str, size_bytes: int, chunks: Iterator[bytes]
) -> Iterator[bytes]:
    """A zip with the `small` files, and then `name`, whose `size_bytes` bytes come in `chunks`."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w") as archive:
        for path, body in small.items():
            archive.writestr(_entry(path), body)
        with archive.open(_entry(name), "w", force_zip64=size_bytes >= zipfile.ZIP64_LIMIT) as written:
            for chunk in chunks:
                written.write(chunk)
                yield sink.taken()
    yield sink.taken()


def _entry(path: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(path, _EPOCH)
    entry.external_attr = _READABLE
    return entry


class _Sink(io.RawIOBase):
    """Where a zip is written to: keeps what has not been sent, and cannot go back."""

    def __init__(self) -> None:
        self._held = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]  # typeshed's Buffer is Python 3.12's
        self._held += data
        return len(data)

    def taken(self) -> bytes:
        taken = bytes(self._held)
        self._held.clear()
        return taken
