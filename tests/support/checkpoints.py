"""Checkpoints for tests of the offline merge, and what their average must be: brute force, in exact arithmetic."""

from __future__ import annotations

import json
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import torch

from wa_core.specs import format_dtype_name
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor


def network(step: int, *, dtype: torch.dtype = torch.float32, size: int = 301) -> dict[str, Tensor]:
    """The weights of a small network with BatchNorm at a step, drawn for that step."""
    draw = torch.Generator().manual_seed(step)
    return {
        "conv.weight": torch.randn(8, 3, 3, 3, generator=draw).to(dtype),
        "bn.running_mean": torch.randn(8, generator=draw).to(dtype),
        "bn.running_var": torch.rand(8, generator=draw).to(dtype),
        "bn.num_batches_tracked": torch.tensor(step),
        "mask": torch.rand(5, generator=draw) > 0.5,
        "big": torch.randn(3, size, generator=draw).to(dtype),
        "scalar": torch.randn((), generator=draw).to(dtype),
        "nothing": torch.empty(0, 4, dtype=dtype),
    }


def save(folder: Path, states: Mapping[int, Mapping[str, Tensor]]) -> list[Path]:
    """One safetensors file for each step; the paths in the order given."""
    paths = []
    for step, state in states.items():
        path = folder / f"step_{step}.safetensors"
        path.write_bytes(serialize(dict(state)))
        paths.append(path)
    return paths


def file_of(tensors: Sequence[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file with these tensors in this order, which the library would not keep, by whatever names."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.nbytes
        dtype = format_dtype_name(str(tensor.dtype).removeprefix("torch."))
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    data = b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for _, tensor in tensors)
    return len(text).to_bytes(8, "little") + text + data


def exact_average(tensors: Sequence[Tensor], coefficients: Sequence[Fraction]) -> Tensor:
    """The weighted sum in rational numbers, rounded once to the tensors' dtype (to nearest, ties to even)."""
    columns = zip(*(tensor.flatten().double().tolist() for tensor in tensors), strict=True)
    exact = [
        sum((part * Fraction(value) for part, value in zip(coefficients, column, strict=True)), Fraction(0))
        for column in columns
    ]
    return torch.stack([nearest(value, tensors[0].dtype) for value in exact]).reshape(tensors[0].shape)


def nearest(value: Fraction, dtype: torch.dtype) -> Tensor:
    """The number of `dtype` nearest to `value`; of two, the one whose last bit is 0."""
    if dtype.itemsize == 1:
        around = list(torch.arange(256, dtype=torch.uint8).view(dtype))
    else:
        guess = torch.tensor(float(value), dtype=torch.float64).to(dtype)
        ends = [torch.tensor(end, dtype=dtype) for end in (torch.inf, -torch.inf)]
        around = [guess, *(torch.nextafter(guess, end) for end in ends)]
    finite = [found for found in around if bool(torch.isfinite(found.float()))]
    return min(finite, key=lambda found: (abs(Fraction(found.double().item()) - value), _last_bit(found)))


def _last_bit(found: Tensor) -> int:
    return int(np.frombuffer(found.reshape(1).view(torch.uint8).numpy().tobytes(), np.uint8)[0]) & 1
