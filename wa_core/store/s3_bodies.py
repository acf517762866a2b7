"""The bodies of S3's answers on their way into memory, and of requests out of files.

An answer comes in chunks of its own, or straight to where it is wanted. It knows what botocore opens, and what is
below that; neither errors' meaning nor retries. The invariant: a body that ends before its promised length is an
error, and what came before is sound.
"""

from __future__ import annotations

import io
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, BinaryIO

from botocore.exceptions import ResponseStreamingError

from wa_core.errors import StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK_BYTES = 1 << 20


def chunks_of(opened: Any, key: str) -> Iterator[bytes]:  # noqa: ANN401  a botocore response
    """The body, in chunks of 1 MiB."""
    left = opened["ContentLength"]
    with opened["Body"] as raw:
        while chunk := raw.read(CHUNK_BYTES):
            left -= len(chunk)
            yield chunk
    _check_whole(key, left)


def fill_from(opened: Any, key: str, out: memoryview) -> Iterator[int]:  # noqa: ANN401  a botocore response
    """Put the body into `out`; yields how many bytes have been added, 1 MiB at most at a time."""
    left = opened["ContentLength"]
    out = out[:left]
    with opened["Body"] as raw:
        # Python's own answer below urllib3's, which would read into new memory and copy (ADR 52).
        answer = getattr(raw, "_fp", opened["Body"])
        while count := _read_into(answer, out[:CHUNK_BYTES]):
            out, left = out[count:], left - count
            yield count
        if not left:
            raw.release_conn()  # to be used again
    _check_whole(key, left)


class KeptOpen(io.RawIOBase):
    """A file that `upload_fileobj` may read but, contrary to its habit, not close."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """If the file is."""
        return self._file.seekable()

    def read(self, size: int = -1) -> bytes:
        """Read on."""
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The place."""
        return self._file.tell()


def _read_into(answer: Any, out: memoryview) -> int:  # noqa: ANN401
    try:
        return int(answer.readinto(out))
    except (OSError, HTTPException) as error:
        raise ResponseStreamingError(error=error) from error


def _check_whole(key: str, left: int) -> None:
    if left:
        raise StoreUnavailableError(f"{key}: the connection ended {left} bytes early; read on from there")
