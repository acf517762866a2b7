"""What an average must be: every surviving sound checkpoint folded once, in order, in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from support.simulation.script import weights
from wa_core.averaging.rules import parse_rule
from wa_core.averaging.shadow import ShadowWeights

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Expected:
    """The coefficients by step, and the averaged tensors in the checkpoints' dtypes (None: nothing counted)."""

    coefficients: Mapping[int, float]
    value: Mapping[str, torch.Tensor] | None


@cache
def expected(rule: str, dtype: str, path: tuple[tuple[int, int], ...]) -> Expected:
    """The average of a path of sound checkpoints, each a (step, attempt)."""
    shadow = ShadowWeights(parse_rule(rule), dtype=getattr(torch, dtype))
    for step, attempt in path:
        shadow.fold(weights(step, attempt), step=step)
    return Expected(shadow.coefficients(), shadow.value() if shadow.n_averaged else None)
