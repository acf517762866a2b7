"""The files that a checkpoint consists of, as runs of bytes: on this machine or in an object store.

It knows byte ranges and where a safetensors header ends; not tensors' names or what they are for. The invariant: a
`Part` has the length that it had when it was opened, or reading says so.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Protocol

from wa_core.errors import CorruptError, InvalidInputError, StoreUnavailableError
from wa_core.header import LENGTH_BYTES, parse_header, parse_length

if TYPE_CHECKING:
    from pathlib import Path

    from wa_core.header import Header
    from wa_core.store.base import ObjectStore

_PREFIX_BYTES = 64  # enough to tell foreign files apart
_TRIES = 6


class Part(Protocol):
    """One file of a source: a run of bytes with a name."""

    @property
    def name(self) -> str:
        """The file's own name, without folders."""
        ...

    @property
    def size_bytes(self) -> int:
        """Its length."""
        ...

    @property
    def sha256(self) -> str | None:
        """What a record says that its digest is."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether reading pays for every request."""
        ...

    def read_into(self, begin: int, out: memoryview) -> int:
        """Fill `out` from byte `begin` on; how many bytes there were."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class FilePart:
    """A local file, read with `pread`.

    Args:
        path: where it is.
        size_bytes: what a record says its size is.
        sha256: what a record says its digest is, in hex.

    Raises:
        InvalidInputError: there is no such file, or it cannot be opened.
        CorruptError: it has another size (`size_mismatch`).
    """

    is_remote = False

    def __init__(self, path: Path, *, size_bytes: int | None = None, sha256: str | None = None) -> None:
        self.name = path.name
        self.sha256 = sha256
        try:
            # Not waiting: a pipe without a writer would never open.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise InvalidInputError(
                f"{path} cannot be read: {error.strerror or error}; check the name and its permissions",
                code="source_unreadable",
            ) from error
        status = os.fstat(self._fd)
        self.size_bytes = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise InvalidInputError(
                f"{path} cannot be read: it is no file but a device, a pipe or the like; name a file",
                code="source_unreadable",
            )
        if size_bytes not in (None, self.size_bytes):
            self.close()
            raise _other_size(str(path), expected=size_bytes, found=self.size_bytes)

    def read_into(self, begin: int, out: memoryview) -> int:
        """Fill `out` from byte `begin` on; how many bytes there were."""
        filled = 0
        while filled < len(out) and (read := os.preadv(self._fd, [out[filled:]], begin + filled)):
            filled += read
        return filled

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class ObjectPart:
    """An object in a store, read by ranges; or at once, with a single request when its size is recorded.

    A read that breaks off goes on where it broke.

    Args:
        store: where it is.
        key: its key.
        size_bytes: what a record says its size is.
        sha256: what a record says its digest is, in hex.
        whole_bytes: an object of at most this size is fetched now and kept in memory until it is closed.

    Raises:
        ObjectNotFoundError: no object has this key.
        CorruptError: it has another size (`size_mismatch`).
    """

    is_remote = True

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        *,
        size_bytes: int | None = None,
        sha256: str | None = None,
        whole_bytes: int = 0,
    ) -> None:
        self.name = key.rpartition("/")[2]
        self.sha256 = sha256
        self._store = store
        self._key = key
        self._body: memoryview | None = None
        self.size_bytes = (
            store.head(key).size_bytes if size_bytes is None or size_bytes > whole_bytes else size_bytes
        )
        if self.size_bytes <= whole_bytes:
            # One byte more than there should be, to notice a longer object.
            body = memoryview(bytearray(self.size_bytes + 1))
            self._body = body[: self._fetch_into(0, body)]
            self.size_bytes = len(self._body)
        if size_bytes not in (None, self.size_bytes):
            raise _other_size(key, expected=size_bytes, found=self.size_bytes)

    def read_into(self, begin: int, out: memoryview) -> int:
        """Fill `out` from byte `begin` on; how many bytes there were."""
        if self._body is None:
            return self._fetch_into(begin, out)
        found = self._body[begin : begin + len(out)]
        out[: len(found)] = found
        return len(found)

    def close(self) -> None:
        """Let go of what was fetched."""
        self._body = None

    def _fetch_into(self, begin: int, out: memoryview) -> int:
        import stamina  # local files do without, and without the time that it takes to load

        filled = 0
        for attempt in stamina.retry_context(
            on=StoreUnavailableError, attempts=_TRIES, timeout=None, wait_initial=0.05, wait_max=2.0
        ):
            with attempt:
                for chunk in self._store.stream(self._key, start=begin + filled, end=begin + len(out)):
                    out[filled : filled + len(chunk)] = chunk
                    filled += len(chunk)
        return filled


def read_header(part: Part) -> tuple[Header, bytes]:
    """A file's header, checked completely, and the bytes before the data; each of them is read once.

    Raises:
        CorruptError: with the codes of `wa_core.header`, or `truncated_data` or `trailing_bytes`.
    """
    prefix = memoryview(bytearray(min(_PREFIX_BYTES, part.size_bytes)))
    part.read_into(0, prefix)
    length = parse_length(bytes(prefix))
    data_begin = LENGTH_BYTES + length
    if data_begin > part.size_bytes:
        raise CorruptError(
            f"the header claims {length} bytes, but the whole file has {part.size_bytes}; it was cut off, or "
            f"is no safetensors; save it again",
            code="header_length",
        )
    start = bytearray(data_begin)
    known = min(len(prefix), data_begin)
    start[:known] = prefix[:known]
    if known + part.read_into(known, memoryview(start)[known:]) < data_begin:
        raise cut_off(data_begin, part.size_bytes)
    header = parse_header(bytes(start[LENGTH_BYTES:]))
    end = data_begin + header.data_bytes
    if end > part.size_bytes:
        raise cut_off(end, part.size_bytes)
    if end < part.size_bytes:
        raise CorruptError(
            f"{part.size_bytes - end} bytes follow the last tensor, which ends at {end}; save it again",
            code="trailing_bytes",
        )
    return header, bytes(start)


def cut_off(expected: int, found: int) -> CorruptError:
    """The error for a file that is shorter than its header says (code `truncated_data`)."""
    message = f"the header describes a file of {expected} bytes, but it ends at {found}; fetch or save it again"
    return CorruptError(message, code="truncated_data")


def _other_size(name: str, *, expected: int | None, found: int) -> CorruptError:
    message = f"{name}: the record says {expected} bytes, but it has {found}; fetch or save it again"
    return CorruptError(message, code="size_mismatch")
