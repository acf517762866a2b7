"""Checkpoints of a small model, step by step, and averages of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wa_core.averaging.shadow import ShadowWeights
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from wa_core.averaging.rules import Rule

STEPS = [3, 20, 40, 41, 100, 137, 500]


def state_at(step: int, *, dtype: torch.dtype = torch.float32, size: int = 301) -> dict[str, Tensor]:
    """A checkpoint of a small network, drawn for its step."""
    draw = torch.Generator().manual_seed(step)
    return {
        "conv.weight": torch.randn(8, 3, 3, 3, generator=draw).to(dtype),
        "bn.running_mean": torch.randn(8, generator=draw).to(dtype),
        "bn.num_batches_tracked": torch.tensor(step),
        "mask": torch.rand(5, generator=draw) > 0.5,
        "big": torch.randn(3, size, generator=draw).to(dtype),
        "scalar": torch.randn((), generator=draw).to(dtype),
        "nothing": torch.empty(0, 4, dtype=dtype),
    }


def folded(rule: Rule, steps: list[int], *, dtype: torch.dtype) -> ShadowWeights:
    """A shadow after the checkpoints of `steps`."""
    shadow = ShadowWeights(rule, dtype=dtype)
    for step in steps:
        shadow.fold(state_at(step), step=step)
    return shadow


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal names, dtypes, shapes and bits."""
    assert serialize(found) == serialize(expected)
