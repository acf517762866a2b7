"""Checkpoints of a small model, step by step, and averages of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from support.checkpoints import network
from wa_core.averaging.shadow import ShadowWeights
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from wa_core.averaging.rules import Rule

STEPS = [3, 20, 40, 41, 100, 137, 500]


def state_at(step: int, *, dtype: torch.dtype = torch.float32, size: int = 301) -> dict[str, Tensor]:
    """As `network`, but without a variance, which alone is not averaged element by element."""
    state = network(step, dtype=dtype, size=size)
    del state["bn.running_var"]
    return state


def folded(rule: Rule, steps: list[int], *, dtype: torch.dtype) -> ShadowWeights:
    """A shadow after the checkpoints of `steps`."""
    shadow = ShadowWeights(rule, dtype=dtype)
    for step in steps:
        shadow.fold(state_at(step), step=step)
    return shadow


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal names, dtypes, shapes and bits."""
    assert serialize(found) == serialize(expected)
