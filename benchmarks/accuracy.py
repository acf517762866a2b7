"""Errors of long averages against exact arithmetic: ours, its peers' formulas, in float32, float64 and bfloat16.

`python -m benchmarks.accuracy` folds thousands of noisy vectors, keeps the exact average in float64 with a carried
remainder beside them, and writes `benchmarks/results/accuracy.{json,md}`: the largest error, in units of the exact
value's last place in the inputs' dtype. torch's class is called as its users call it; `d*e + (1-d)*w` is what many
others compute.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from benchmarks import results
from wa_core.averaging.rules import EmaRule, SwaRule
from wa_core.averaging.shadow import ShadowWeights

if TYPE_CHECKING:
    from collections.abc import Callable

    from wa_core.averaging.rules import Rule

WIDTH = 512
# name -> rule, decay (None: the plain mean), folds
CASES: dict[str, tuple[Rule, float | None, int]] = {
    "SWA": (SwaRule(), None, 20_000),
    "EMA d=0.999": (EmaRule(decay=0.999, init="first"), 0.999, 20_000),
    "EMA d=0.99999": (EmaRule(decay=0.99999, init="first"), 0.99999, 20_000),
}
UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}


class Vector(nn.Module):
    """A model of one parameter."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(WIDTH, dtype=dtype))


class Exact:
    """The recursion in float64 with a carried remainder: its own error is far below what is measured."""

    def __init__(self) -> None:
        self.value = torch.zeros(WIDTH, dtype=torch.float64)
        self._rest = torch.zeros_like(self.value)
        self.n = 0

    def fold(self, now: Tensor, decay: float | None) -> None:
        """Fold one vector."""
        self.n += 1
        weight = 1.0 if self.n == 1 else 1 / self.n if decay is None else 1 - decay
        change = weight * (now.double() - self.value) + self._rest
        after = self.value + change
        self._rest = change - (after - self.value)
        self.value = after


def readers(model: Vector, rule: Rule, decay: float | None) -> dict[str, tuple[Callable[[int], object], Any]]:
    """Every implementation: how to update it at a step, and how to read it."""
    kernel = get_swa_multi_avg_fn() if decay is None else get_ema_multi_avg_fn(decay)
    peer = AveragedModel(model, multi_avg_fn=kernel)
    old = torch.zeros_like(model.values)

    def two_products(step: int) -> None:
        # d * e + (1 - d) * w, as many implementations have it.
        kept = (step - 1) / step if decay is None else (decay if step > 1 else 0.0)
        old.mul_(kept).add_(model.values, alpha=1 - kept)

    shadows = {dtype: ShadowWeights(rule, dtype=dtype) for dtype in (torch.float32, torch.float64)}
    found: dict[str, tuple[Callable[[int], object], Any]] = {
        "AveragedModel": (lambda _: peer.update_parameters(model), lambda: peer.module.values),
        "d*e + (1-d)*w": (two_products, lambda: old),
    }
    for dtype, shadow in shadows.items():
        found[f"ShadowWeights, {str(dtype).removeprefix('torch.')}"] = (
            lambda step, shadow=shadow: shadow.fold(model.state_dict(), step=step),  # type: ignore[misc]
            lambda shadow=shadow: shadow.value()["values"],  # type: ignore[misc]
        )
    return found


def measure(rule: Rule, decay: float | None, folds: int, dtype: torch.dtype) -> dict[str, float]:
    """The largest error of every implementation, in units of the last place."""
    draw = torch.Generator().manual_seed(0)
    start = 1.2 + 0.6 * torch.rand(WIDTH, generator=draw)  # around one binade: a unit means the same everywhere
    model, exact = Vector(dtype), Exact()
    kinds = readers(model, rule, decay)
    with torch.no_grad():
        for step in range(1, folds + 1):
            model.values.copy_(start + 0.05 * torch.randn(WIDTH, generator=draw))
            exact.fold(model.values, decay)
            for update, _ in kinds.values():
                update(step)
    place = UNIT[dtype] * torch.exp2(torch.floor(torch.log2(exact.value.abs())))
    return {
        name: float(((read().detach().double() - exact.value).abs() / place).max())
        for name, (_, read) in kinds.items()
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shorter", type=int, default=1, help="divide the number of folds by this")
    shorter = parser.parse_args().shorter
    rows = [
        {"case": case, "dtype": str(dtype).removeprefix("torch."), "folds": folds // shorter}
        | {"ulp": measure(rule, decay, folds // shorter, dtype)}
        for case, (rule, decay, folds) in CASES.items()
        for dtype in UNIT
    ]
    kinds = list(rows[0]["ulp"])
    lines = [
        [row["case"], row["dtype"], f"{row['folds']:,}", *(f"{row['ulp'][kind]:.3g}" for kind in kinds)]
        for row in rows
    ]
    text = (
        "Largest error against exact arithmetic, in units of the last place of the inputs' dtype. Half a unit is "
        f"the rounding of the result itself.\n\n{results.table(['average', 'inputs', 'folds', *kinds], lines)}"
    )
    results.write("accuracy", data={"rows": rows}, text=text)


if __name__ == "__main__":
    main()
