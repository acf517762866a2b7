"""A written average as bytes in memory, for those that are small.

It knows one file format; no arithmetic, no disk and no torch. The invariant: there are no bytes before `commit`,
and then, unless a text has changed since `begin`, those of the file of
`wa_core.averaging.files.output.SafetensorsWriter`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from wa_core.errors import InvalidInputError
from wa_core.header import LENGTH_BYTES, METADATA_KEY
from wa_core.specs import TIED_KEY

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from wa_core.averaging.files.stored import StoredTensor


class BytesWriter:
    """A `wa_core.averaging.files.output.Writer` whose file is `body`, once committed."""

    def __init__(self) -> None:
        self._entries: dict[str, object] = {}
        self._offsets: dict[str, int] = {}
        self._texts: dict[str, str] = {}
        self._data = bytearray()
        self._body: bytes | None = None

    @property
    def body(self) -> bytes:
        """The file.

        Raises:
            InvalidInputError: nothing was committed.
        """
        if self._body is None:
            raise InvalidInputError("nothing was written: the writer has not been committed")
        return self._body

    def begin(
        self, tensors: Sequence[StoredTensor], *, ties: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        """Lay the tensors out and take the memory for them."""
        end = 0
        for tensor in tensors:
            begin, end = end, end + tensor.size_bytes
            shape = list(tensor.spec.shape)
            self._entries[tensor.spec.name] = {
                "dtype": tensor.dtype,
                "shape": shape,
                "data_offsets": [begin, end],
            }
            self._offsets[tensor.spec.name] = begin
        self._texts = dict(metadata) | ({TIED_KEY: json.dumps(dict(ties), sort_keys=True)} if ties else {})
        self._data = bytearray(end)

    def has(self, name: str, begin: int, size_bytes: int) -> bool:  # noqa: ARG002  the port's signature
        """Nothing: there is no older merge."""
        return False

    def write(self, name: str, begin: int, data: memoryview) -> None:
        """Put `data` at byte `begin` of tensor `name`."""
        begin += self._offsets[name]
        self._data[begin : begin + len(data)] = data

    def commit(self, metadata: Mapping[str, str]) -> tuple[Path, ...]:
        """Make `body`; it consists of no file."""
        header = {METADATA_KEY: dict(sorted((self._texts | dict(metadata)).items())), **self._entries}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % LENGTH_BYTES)
        self._body = b"".join([len(text).to_bytes(LENGTH_BYTES, "little"), text, self._data])
        self._data = bytearray()
        return ()

    def abort(self) -> None:
        """Forget what was written; after `commit`, do nothing."""
        self._data = bytearray()
