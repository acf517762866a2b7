"""How much is left of what an exponential average held before, as logarithms: near 0 and near 1 alike exact.

Closed forms in plain floats, for what `wa_core.averaging.rules.EmaRule` says in words; they check nothing.
"""

from __future__ import annotations

import math

_LN2 = math.log(2.0)


def log_left(half_life: float, rampup: float | None, *, begin: int, end: int) -> float:
    """``log D(begin, end)``: what is left at step `end` of the weight at step `begin`, both since the start.

    Args:
        half_life: in steps.
        rampup: the half-life is at most so many times the steps since the start; None for no bound.
        begin: a step >= 0.
        end: a later step.
    """
    if rampup is None:
        return -_LN2 / half_life * (end - begin)
    if begin == 0:
        return -math.inf
    full = half_life / rampup  # from here on the half-life is the whole one
    ramp_begin, ramp_end = min(begin, full), min(end, full)
    ramp = math.log1p((ramp_end - ramp_begin) / ramp_begin) / rampup
    return -_LN2 * (ramp + (max(end, full) - max(begin, full)) / half_life)


def log_left_of_zero(decay: float, warmup: int | None, *, num_folds: int) -> float:
    """Logarithm of the product of the decays of the first `num_folds` folds: what is left of an initial zero.

    Args:
        decay: per fold, in (0, 1).
        warmup: the decay after ``n`` folds is at most ``(1 + n) / (warmup + n)``; None for no bound.
        num_folds: >= 1.
    """
    if warmup is None:
        return math.log(decay) * num_folds
    # So many folds n have (1 + n) / (warmup + n) below the decay.
    num_warm = min(num_folds, max(0, math.ceil((warmup * decay - 1.0) / (1.0 - decay))))
    warm = math.lgamma(warmup) + math.lgamma(num_warm + 1.0) - math.lgamma(num_warm + warmup)
    return warm + math.log(decay) * (num_folds - num_warm)
