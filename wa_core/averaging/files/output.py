"""Where an average is written: the port, and the plain safetensors file behind it.

It knows bytes by tensor name, and one file format; no arithmetic and no torch. The invariant: what stands under
the output's name is the old file or the new one, whole; a failure or a kill leaves at most a temporary file. A
power cut is another matter: only with `sync` has the disk everything before the name changes (ADR 0009).
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from typing import TYPE_CHECKING, Protocol

from wa_core.errors import InvalidInputError
from wa_core.header import LENGTH_BYTES, METADATA_KEY
from wa_core.specs import TIED_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from wa_core.averaging.files.stored import StoredTensor

_ANY_FILE = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
_NEW_FILE = _ANY_FILE | os.O_EXCL


class Writer(Protocol):
    """Takes an average tensor by tensor, in blocks of any size, in any order, from several threads.

    First `begin`, then `write` until every byte has come once, then `commit`; `abort` instead at any time.
    """

    def begin(
        self, tensors: Sequence[StoredTensor], *, ties: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        """Make room.

        Args:
            tensors: what will be written, in file order.
            ties: alias -> name; aliases are not written, but a reader must find them again.
            metadata: texts for the output. Those of `commit` have the same keys and no longer values.
        """
        ...

    def has(self, name: str, begin: int, size_bytes: int) -> bool:
        """Whether these bytes are there already, from a merge of the same job that was killed."""
        ...

    def write(self, name: str, begin: int, data: memoryview) -> None:
        """Put `data` at byte `begin` of tensor `name`."""
        ...

    def commit(self, metadata: Mapping[str, str]) -> tuple[Path, ...]:
        """Make the output visible, all of it at once; the files that it consists of."""
        ...

    def abort(self) -> None:
        """Remove what was written; after `commit`, do nothing."""
        ...


def sync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def leave_to_system(_: Path) -> None:
    """Do not wait; the system writes in its own time, within half a minute or so."""


class SafetensorsWriter:
    """One safetensors file, written to a temporary neighbour and renamed over `path` at the end.

    Args:
        path: the file.
        part: where to write until then, on the same file system. Unlike the file with a random name that is the
            default, it may be there already, and then its data is kept, for a merge that goes on.
        sync: how to wait for the disk, before the rename and after it: `sync_path`, or not at all.

    Raises:
        InvalidInputError: `path` cannot be written (code `output_not_writable`), from `begin` on.
    """

    def __init__(
        self, path: Path, *, part: Path | None = None, sync: Callable[[Path], None] = leave_to_system
    ) -> None:
        self._path = path
        self._sync = sync
        self._part = part or path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        self._flags = _ANY_FILE if part else _NEW_FILE
        self._fd = -1
        self._offsets: dict[str, int] = {}
        self._header: dict[str, object] = {}
        self._header_bytes = 0
        self._data_bytes = 0

    def begin(
        self, tensors: Sequence[StoredTensor], *, ties: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        """Lay the tensors out and take the disk space for them."""
        if ties:
            metadata = {**metadata, TIED_KEY: json.dumps(dict(ties), sort_keys=True)}
        entries: dict[str, object] = {}
        end = 0
        for tensor in tensors:
            begin, end = end, end + tensor.size_bytes
            shape = list(tensor.spec.shape)
            entries[tensor.spec.name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": [begin, end]}
            self._offsets[tensor.spec.name] = begin
        self._header = {METADATA_KEY: dict(sorted(metadata.items())), **entries}
        text = _encode(self._header)
        self._header_bytes, self._data_bytes = len(text) + -len(text) % 8, end
        try:
            self._fd = os.open(self._part, self._flags, 0o666)
            _take_space(self._fd, LENGTH_BYTES + self._header_bytes + end)
        except OSError as error:
            raise self._failed(error) from error

    def has(self, name: str, begin: int, size_bytes: int) -> bool:  # noqa: ARG002  the port's signature
        """Nothing: this writer does not know what an older merge left."""
        return False

    def write(self, name: str, begin: int, data: memoryview) -> None:
        """Put `data` at byte `begin` of tensor `name`."""
        self._pwrite(LENGTH_BYTES + self._header_bytes + self._offsets[name] + begin, data)

    def commit(self, metadata: Mapping[str, str]) -> tuple[Path, ...]:
        """Write the header and rename; wait for the disk if that is wanted."""
        kept = self._header[METADATA_KEY]
        assert isinstance(kept, dict)  # noqa: S101  `begin` built it
        text = _encode({**self._header, METADATA_KEY: {**kept, **metadata}}).ljust(self._header_bytes)
        if len(text) != self._header_bytes:
            raise InvalidInputError(f"the metadata grew by {len(text) - self._header_bytes} bytes since `begin`")
        self._pwrite(0, memoryview(len(text).to_bytes(LENGTH_BYTES, "little") + text))
        try:
            self._close()
            self._sync(self._part)
            self._part.replace(self._path)
            self._sync(self._path.parent)
        except OSError as error:
            raise self._failed(error) from error
        return (self._path,)

    @property
    def data_bytes(self) -> int:
        """Of all tensors together, once begun."""
        return self._data_bytes

    def suspend(self) -> None:
        """Stop, and keep the temporary file for a merge that goes on."""
        self._close()

    def abort(self) -> None:
        """Remove the temporary file."""
        self._close()
        self._part.unlink(missing_ok=True)

    def _pwrite(self, offset: int, data: memoryview) -> None:
        try:
            while data:
                written = os.pwrite(self._fd, data, offset)
                offset, data = offset + written, data[written:]
        except OSError as error:
            raise self._failed(error) from error

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _failed(self, error: OSError) -> InvalidInputError:
        why = error.strerror or str(error)
        return InvalidInputError(
            f"{self._path} cannot be written: {why}; free the space or choose another place",
            code="output_not_writable",
        )


def _take_space(fd: int, size_bytes: int) -> None:
    os.ftruncate(fd, size_bytes)
    if sys.platform == "linux":
        # A full disk is found out now, and writing into space that is there takes a third less of the processor.
        os.posix_fallocate(fd, 0, size_bytes)


def _encode(header: Mapping[str, object]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()
