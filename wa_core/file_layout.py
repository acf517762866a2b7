"""Where the bytes of a state dict go in a safetensors file: header and offsets, without touching the data.

It knows tensors' names, dtypes, shapes and memory; not their values, and not where the file is. The invariant:
the same tensors give the same layout, in whatever order they come; every tensor is aligned to its own element
size, and those that share memory have one place.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from wa_core.errors import CorruptError, InvalidInputError
from wa_core.header import LENGTH_BYTES, METADATA_KEY, check_name
from wa_core.specs import TIED_KEY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
FORMAT_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes go: `begin` up to `end` of the whole file."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A safetensors file but for its data: everything before it, and where each tensor goes, in order, gapless."""

    head: bytes
    places: tuple[Place, ...]

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""
        return self.places[-1].end if self.places else len(self.head)


def lay_out(
    state: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None, restore_ties: bool = False
) -> FileLayout:
    """Say what the file of `serialize` looks like, with its arguments and errors, without touching the data."""
    texts = {"format": "pt", **(metadata or {})}
    if TIED_KEY in texts or not state:
        raise InvalidInputError("a checkpoint needs tensors, and its metadata must leave the key 'tied' free")
    for name, tensor in state.items():
        _check_writable(name, tensor)
    ties = {} if restore_ties else find_ties(state)
    if ties:
        texts[TIED_KEY] = json.dumps(ties, sort_keys=True)
    # Widest elements first, so that every tensor is aligned to its own element size.
    names = sorted(
        (name for name in state if name not in ties), key=lambda name: (-state[name].element_size(), name)
    )
    header: dict[str, object] = {METADATA_KEY: dict(sorted(texts.items()))}
    places: list[Place] = []
    end = 0
    for name in names:
        begin, end = end, end + state[name].nbytes
        places.append(Place(name, begin, end))
        dtype = FORMAT_DTYPES[state[name].dtype]
        header[name] = {"dtype": dtype, "shape": list(state[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return FileLayout(
        head, tuple(Place(place.name, len(head) + place.begin, len(head) + place.end) for place in places)
    )


def find_ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Alias -> name, for names sharing memory, dtype, shape and strides; the first in sort order is the name."""
    first: dict[tuple[object, ...], str] = {}
    ties: dict[str, str] = {}
    for name in sorted(state):
        tensor = state[name]
        if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0:
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if (original := first.setdefault(place, name)) != name:
            ties[name] = original
    return ties


def _check_writable(name: str, tensor: Tensor) -> None:
    try:
        check_name(name)
    except CorruptError as error:
        raise InvalidInputError(error.message, code=error.code) from None
    if hasattr(tensor, "full_tensor"):
        raise InvalidInputError(
            f"tensor {name!r} is distributed, and this process has only a part of it; gather the weights on every "
            f"rank first, with wa_core.integrations.sharded.full_state_dict(model)"
        )
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in FORMAT_DTYPES:
        raise InvalidInputError(
            f"tensor {name!r} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; only dense "
            f"tensors of ordinary dtypes can be written, convert it first"
        )
