"""Where the tensors of a checkpoint lie in its files, and how much of them is read at once.

It knows places and sizes; it opens and reads nothing. The invariant: a piece is whole elements of one tensor, and
the pieces of a stretch follow each other in one file without a gap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wa_core.header import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.averaging.buffers import Raw
    from wa_core.specs import TensorSpec


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as it lies in a source.

    `spec` has the canonical name and torch's dtype name (``float32``), `dtype` is the format's (``F32``).
    The bytes begin at `begin` of file number `file`; they are little-endian and in row-major order.
    """

    spec: TensorSpec
    dtype: str
    size_bytes: int
    file: int = 0
    begin: int = 0

    @property
    def item_bytes(self) -> int:
        """Of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def num_elements(self) -> int:
        """In all dimensions together."""
        return self.size_bytes // self.item_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `begin` up to `end` of one tensor: whole elements."""

    tensor: StoredTensor
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Pieces that follow each other in one file, to be read at once."""

    file: int
    pieces: list[Piece]

    @property
    def begin(self) -> int:
        """The first byte in the file."""
        return self.pieces[0].tensor.begin + self.pieces[0].begin

    @property
    def end(self) -> int:
        """The byte after the last one."""
        return self.pieces[-1].tensor.begin + self.pieces[-1].end

    def cut(self, raw: Raw) -> Iterator[tuple[Piece, Raw]]:
        """The bytes of each piece, from those of the stretch."""
        at = 0
        for piece in self.pieces:
            size = piece.end - piece.begin
            yield piece, raw[at : at + size]
            at += size

    def takes(self, piece: Piece, max_bytes: int) -> bool:
        """Whether `piece` follows and fits into `max_bytes` with it."""
        return piece.tensor.file == self.file and piece.tensor.begin + piece.end - self.begin <= max_bytes
