"""A writer in front of another one that changes the dtype of what was averaged.

It knows element formats; not files or rules. The invariant: tensors that were not averaged (integers, bools, kept
buffers) go through untouched.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from wa_core.averaging.files.blocks import narrow, widen
from wa_core.header import DTYPE_BYTES
from wa_core.specs import torch_dtype_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from wa_core.averaging.files.output import Writer
    from wa_core.averaging.files.stored import StoredTensor


class CastingWriter:
    """Writes averaged tensors as `dtype`; each value is rounded to the checkpoint's dtype first, then to this one.

    Args:
        writer: takes the result.
        dtype: a float dtype by the format's name, such as ``BF16``.
        averaged: the names of the tensors to change.
    """

    def __init__(self, writer: Writer, *, dtype: str, averaged: Collection[str]) -> None:
        self._writer = writer
        self._dtype = dtype
        self._averaged = averaged
        self._from: dict[str, str] = {}

    def begin(
        self, tensors: Sequence[StoredTensor], *, ties: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        """Make room for the tensors in their new dtypes."""
        self._from = {tensor.spec.name: tensor.dtype for tensor in tensors if tensor.spec.name in self._averaged}
        self._writer.begin([self._cast(tensor) for tensor in tensors], ties=ties, metadata=metadata)

    def has(self, name: str, begin: int, size_bytes: int) -> bool:
        """Whether a killed merge has written what these bytes become."""
        return self._writer.has(name, self._scaled(name, begin), self._scaled(name, size_bytes))

    def write(self, name: str, begin: int, data: memoryview) -> None:
        """Put whole elements, which begin at byte `begin` of the tensor as it comes."""
        if name not in self._from:
            self._writer.write(name, begin, data)
            return
        values = widen(np.frombuffer(data, np.uint8), self._from[name])
        self._writer.write(name, self._scaled(name, begin), narrow(values, self._dtype).data)

    def commit(self, metadata: Mapping[str, str]) -> tuple[Path, ...]:
        """Make the output visible."""
        return self._writer.commit(metadata)

    def abort(self) -> None:
        """Stop."""
        self._writer.abort()

    def _scaled(self, name: str, size_bytes: int) -> int:
        if name not in self._from:
            return size_bytes
        return size_bytes // DTYPE_BYTES[self._from[name]] * DTYPE_BYTES[self._dtype]

    def _cast(self, tensor: StoredTensor) -> StoredTensor:
        name = tensor.spec.name
        if name not in self._from:
            return tensor
        return replace(
            tensor,
            spec=replace(tensor.spec, dtype=torch_dtype_name(self._dtype)),
            dtype=self._dtype,
            size_bytes=self._scaled(name, tensor.size_bytes),
        )
