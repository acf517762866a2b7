"""What an average must be: every surviving sound checkpoint folded once, in order, in memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from support.averaging import same_bits
from support.simulation.script import weights
from wa_core.averaging.rules import parse_rule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.averaging.windows import WindowRule

if TYPE_CHECKING:
    from collections.abc import Mapping

_WINDOW_ERROR = 6 * 8 * 2.0**-24


@dataclass(frozen=True, slots=True)
class Expected:
    """The coefficients by step, and the averaged tensors in the checkpoints' dtypes (None: nothing counted)."""

    coefficients: Mapping[int, float]
    value: Mapping[str, torch.Tensor] | None


@cache
def expected(rule: str, dtype: str, path: tuple[tuple[int, int], ...]) -> Expected:
    """The average of a path of sound checkpoints, each a (step, attempt)."""
    parsed = parse_rule(rule)
    if isinstance(parsed, WindowRule):
        return _window(parsed, dict(path))
    shadow = ShadowWeights(parsed, dtype=getattr(torch, dtype))
    for step, attempt in path:
        shadow.fold(weights(step, attempt), step=step)
    return Expected(shadow.coefficients(), shadow.value() if shadow.n_averaged else None)


def same_average(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], *, rule: str) -> bool:
    """Bit for bit; a window is summed in another order than here, perhaps in float32.

    Then each of up to three products and sums, of values below 8, may round by 2^-24 of them. What is not the
    average is off by a checkpoint's share of other random numbers, ten thousand times as much.
    """
    if not rule.startswith("window"):
        return same_bits(found, wanted)
    if found.keys() != wanted.keys():
        return False
    return all(torch.allclose(found[name], wanted[name], rtol=0.0, atol=_WINDOW_ERROR) for name in wanted)


def _window(rule: WindowRule, path: Mapping[int, int]) -> Expected:
    coefficients = rule.coefficients(list(path)) if path else {}
    if not coefficients:
        return Expected({}, None)
    inside = {step: weights(step, path[step]) for step in coefficients}
    last = inside[max(inside)]
    value = {
        name: (
            sum(share * inside[step][name].double() for step, share in coefficients.items()).float()  # type: ignore[union-attr]
            if tensor.is_floating_point()
            else tensor
        )
        for name, tensor in last.items()
    }
    return Expected(coefficients, value)
