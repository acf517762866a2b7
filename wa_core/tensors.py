"""State dicts and safetensors files: ties, deterministic bytes, streaming reads.

It knows torch and one file format; it does not know where bytes come from or what tensors are for. Reading keeps
one invariant: a `Checkpoint` is returned only when the header was sound, every byte arrived exactly once and the
recorded size and digest, when given, hold. Otherwise there is a `CorruptError` with a stable code.

Tied tensors (same memory, shape and strides under several names) are written once; the metadata entry ``tied``
maps every other name to the one written, and reading restores them.
"""

from __future__ import annotations

import hashlib
import io
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wa_core.errors import CorruptError, InvalidInputError
from wa_core.file_layout import TORCH_DTYPES, lay_out
from wa_core.header import LENGTH_BYTES, parse_header, parse_length
from wa_core.specs import TensorSpec, canonical_name, name_collision, parse_ties, shorten

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from wa_core.header import Header, Region

_FIRST_BUFFER_BYTES = 16 * 1024 * 1024


def canonical_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, not copied, under names without the parts that DDP, `torch.compile` and FSDP insert.

    Raises:
        IncompatibleError: two names become one (code `name_collision`).
        InvalidInputError: it is no state dict: not a mapping, a key that is no text or a value that is no tensor.
    """
    if not isinstance(state, Mapping):
        raise InvalidInputError(
            f"weights are a dict of tensors, not a {type(state).__name__}; pass model.state_dict()"
        )
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise InvalidInputError(f"{name!r} is no name of a tensor; pass model.state_dict()")
        if not isinstance(tensor, Tensor):
            raise InvalidInputError(
                f"{name!r} is of type {type(tensor).__name__}, not a tensor; leave extra state out of the weights"
            )
        canonical = canonical_name(name)
        if canonical in found:
            raise name_collision(name)
        found[canonical] = tensor
    return found


def spec_of(state: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """The specs of all tensors, sorted by name."""
    return tuple(
        sorted(
            TensorSpec(name, str(value.dtype).removeprefix("torch."), tuple(value.shape))
            for name, value in state.items()
        )
    )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity.

    Raises:
        CorruptError: `not_finite`; the message names the tensors and how many values are bad.
    """
    bad = [
        f"{name!r} has {count} of {tensors[name].numel()}"
        for name in tensors
        if (count := _num_bad(tensors[name]))
    ]
    if bad:
        raise CorruptError(
            f"values that are NaN or infinite: {shorten(bad)}; the training has diverged here; lower the "
            f"learning rate or resume from an earlier step",
            code="not_finite",
        )


def _num_bad(tensor: Tensor) -> int:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return 0
    values = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
    # Minimum and maximum carry NaN and infinity along, at ten times the speed of isfinite.
    if not values.is_complex() and bool(torch.isfinite(torch.stack(torch.aminmax(values))).all()):
        return 0
    return int((~torch.isfinite(values)).sum())


def serialize(
    state: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None, restore_ties: bool = False
) -> bytes:
    """A safetensors file. The same tensors and metadata give the same bytes, in whatever order they come.

    Args:
        state: dense tensors by name, on any device.
        metadata: texts for the header; ``format`` is ``pt`` unless given.
        restore_ties: write every alias as a full copy, for readers that do not know the ``tied`` entry.

    Raises:
        InvalidInputError: there are no tensors, one is sparse, quantised or of a dtype without a place in the
            format, or `metadata` uses the reserved key ``tied``.
    """
    layout = lay_out(state, metadata=metadata, restore_ties=restore_ties)
    return b"".join([layout.head, *(_bytes_of(state[place.name]) for place in layout.places)])


def pickled(state: object) -> bytes:
    """`state` as `torch.save` writes it; of tensors and plain values it loads with ``weights_only=True``."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A file that was read whole and found sound. Tied tensors are the same object under all their names."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    specs: tuple[TensorSpec, ...]
    size_bytes: int
    sha256: str


def read_checkpoint(
    chunks: Iterable[bytes], *, size_bytes: int | None = None, sha256: str | None = None
) -> Checkpoint:
    """Read a safetensors file in one pass, straight into its tensors.

    The header is checked completely before any data is accepted. Memory follows the bytes that arrive, never what
    a header claims, unless the header agrees with `size_bytes`.

    Args:
        chunks: the file's bytes in order, cut anywhere.
        size_bytes: what the record says the file's size is.
        sha256: what the record says the file's digest is, in hex.

    Raises:
        CorruptError: with the codes of `wa_core.header`, or `truncated_data`, `trailing_bytes`, `size_mismatch`,
            `digest_mismatch`, `bad_value` or `bad_ties`.
    """
    source = _Source(chunks)
    header, data_begin = _read_header(source, size_bytes)
    end = data_begin + header.data_bytes
    tensors: dict[str, Tensor] = {}
    if size_bytes in (None, end):
        for region in header.regions:
            buffer = source.read_tensor(region.end - region.begin, is_size_known=size_bytes is not None)
            if buffer is None:
                break
            tensors[region.name] = _shape(buffer, region)
    source.drain(max(end, size_bytes or 0))
    _check_end(source, end=end, size_bytes=size_bytes, sha256=sha256)
    _restore_ties(tensors, header.metadata)
    return Checkpoint(tensors, header.metadata, spec_of(tensors), source.num_bytes, source.sha256)


def map_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file of our own, mapped: pages are read when touched, and memory is not taken.

    Writing to a tensor changes neither the file nor anybody else's view of it. The file stays mapped while a
    tensor lives. Tied tensors are the same object under all their names.

    Raises:
        CorruptError: with the codes of `wa_core.header`, or `truncated_data`, `trailing_bytes` or `bad_ties`.
    """
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        length = parse_length(file.read(LENGTH_BYTES))
        header, data_begin = parse_header(file.read(length)), LENGTH_BYTES + length
        if size_bytes != (end := data_begin + header.data_bytes):
            raise CorruptError(
                f"{path}: the header describes a file of {end} bytes, but it has {size_bytes}; write it again",
                code="truncated_data" if size_bytes < end else "trailing_bytes",
            )
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {region.name: _map_tensor(mapped, region, data_begin) for region in header.regions}
    _restore_ties(tensors, header.metadata)
    return tensors


def _map_tensor(mapped: mmap.mmap, region: Region, data_begin: int) -> Tensor:
    dtype, count = TORCH_DTYPES[region.dtype], math.prod(region.shape)
    if count == 0:
        return torch.empty(region.shape, dtype=dtype)
    begin = data_begin + region.begin
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin).reshape(region.shape)


def _read_header(source: _Source, size_bytes: int | None) -> tuple[Header, int]:
    prefix = source.read(LENGTH_BYTES)
    length = parse_length(prefix + source.peek(LENGTH_BYTES))
    text = source.read(length) if size_bytes is None or LENGTH_BYTES + length <= size_bytes else b""
    if len(text) < length:
        has = source.num_bytes if size_bytes is None else size_bytes
        raise CorruptError(
            f"the header claims {length} bytes, but the whole file has {has}; it was cut off, or "
            f"is no safetensors; save it again",
            code="header_length",
        )
    return parse_header(text), LENGTH_BYTES + length


def _shape(buffer: Tensor, region: Region) -> Tensor:
    if region.dtype == "BOOL" and bool((buffer > 1).any()):
        raise CorruptError(
            f"tensor {region.name!r} is bool but has bytes other than 0 and 1; the file is damaged, save it again",
            code="bad_value",
        )
    return buffer.view(TORCH_DTYPES[region.dtype]).reshape(region.shape)


def _check_end(source: _Source, *, end: int, size_bytes: int | None, sha256: str | None) -> None:
    found = source.num_bytes
    if size_bytes is not None and found != size_bytes:
        code, message = "size_mismatch", f"the record says {size_bytes} bytes, but {found} arrived"
    elif found < end:
        code, message = "truncated_data", f"the header describes a file of {end} bytes, but it has {found}"
    elif found > end:
        code, message = (
            "trailing_bytes",
            f"{found - end} or more bytes follow the last tensor, which ends at {end}",
        )
    elif sha256 is not None and source.sha256 != sha256:
        code, message = "digest_mismatch", f"the record says sha256 {sha256}, the bytes have {source.sha256}"
    else:
        return
    raise CorruptError(f"{message}; read the file again, and if that does not help, save it again", code=code)


def _restore_ties(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    stored = dict(tensors)
    for alias, name in parse_ties(metadata, stored.keys()).items():
        tensors[alias] = stored[name]


class _Source:
    """Chunks as one stream of bytes, counted and hashed as they arrive."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    @property
    def sha256(self) -> str:
        """The digest of all that arrived, in hex."""
        return self._hash.hexdigest()

    def read(self, num_bytes: int) -> bytes:
        """The next bytes; fewer at the end of the stream."""
        found = bytearray()
        while len(found) < num_bytes and (self._rest or self._pull()):
            found += self._take(num_bytes - len(found))
        return bytes(found)

    def peek(self, num_bytes: int) -> bytes:
        """What is at hand of the next bytes, without waiting for more."""
        return bytes(self._rest[:num_bytes])

    def read_tensor(self, num_bytes: int, *, is_size_known: bool) -> Tensor | None:
        """The next bytes as a uint8 tensor, or None when the stream ends before."""
        buffer = torch.empty(
            num_bytes if is_size_known else min(num_bytes, _FIRST_BUFFER_BYTES), dtype=torch.uint8
        )
        filled = self._fill(buffer, 0)
        while filled == buffer.numel() < num_bytes:
            larger = torch.empty(min(num_bytes, 2 * filled), dtype=torch.uint8)
            larger[:filled] = buffer
            buffer, filled = larger, self._fill(larger, filled)
        return buffer if filled == num_bytes else None

    def drain(self, limit: int) -> None:
        """Count and hash what is left, but stop once more than `limit` bytes have come in all."""
        self._rest = memoryview(b"")
        while self.num_bytes <= limit and self._pull():
            pass

    def _fill(self, buffer: Tensor, filled: int) -> int:
        view = buffer.numpy().data
        while filled < len(view) and (self._rest or self._pull()):
            part = self._take(len(view) - filled)
            view[filled : filled + len(part)] = part
            filled += len(part)
        return filled

    def _take(self, limit: int) -> memoryview:
        part, self._rest = self._rest[:limit], self._rest[limit:]
        return part

    def _pull(self) -> bool:
        for chunk in self._chunks:
            if chunk:
                self._rest = memoryview(chunk)
                self._hash.update(chunk)
                self.num_bytes += len(chunk)
                return True
        return False
