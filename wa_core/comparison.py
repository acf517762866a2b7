"""Whether one set of weights measures better than another: a paired bootstrap over the same held-out data.

It knows numbers; not models, data or torch. The invariant: the same pairs give the same verdict, to the last bit.

Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3, the percentile interval. Pairing
(resampling differences, not the two sides apart) takes out what makes a sample hard for both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from wa_core.records import Comparison

if TYPE_CHECKING:
    from collections.abc import Iterator

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
NUM_RESAMPLES = 2_000
#: With fewer pairs even a unanimous outcome is likely enough by chance: 2 / 2**5 > 1 - CONFIDENCE, the sign test.
MIN_PAIRS = 6
_SEED = 0
_DRAWN_AT_ONCE = 1 << 20  # bounds the memory


def compare(
    averaged: Floats,
    raw: Floats,
    *,
    metric: str,
    weights: Floats | None = None,
    unit: Literal["sample", "batch"] = "sample",
) -> Comparison | None:
    """Averaged minus raw in `metric` (less is better), with a 95 % interval and a verdict.

    Args:
        averaged: values of shape (n,), one per pair, in the same order as `raw`.
        raw: the same for the raw weights.
        metric: its name, for the record.
        weights: of shape (n,), above 0: how many samples stand behind each pair; None when they count alike.
        unit: what one pair is.

    Returns:
        None where nothing can be said: fewer than `MIN_PAIRS` pairs, sides of different length, or values that are
        not finite.
    """
    differences, shares = _pairs(averaged, raw, weights)
    if len(differences) < MIN_PAIRS or not np.isfinite(differences).all():
        return None
    means = np.concatenate(list(_resampled_means(differences, shares)))
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(bound) for bound in np.quantile(means, [tail, 1 - tail]))
    return Comparison(
        metric=metric,
        difference=float(shares @ differences / shares.sum()),
        low=low,
        high=high,
        confidence=CONFIDENCE,
        num_samples=len(differences),
        unit=unit,
        won="averaged" if high < 0 else "raw" if low > 0 else "tie",
    )


def _pairs(averaged: Floats, raw: Floats, weights: Floats | None) -> tuple[Floats, Floats]:
    if averaged.shape != raw.shape or averaged.ndim != 1:
        return np.empty(0), np.empty(0)
    with np.errstate(invalid="ignore"):
        return averaged - raw, np.ones(len(raw)) if weights is None else weights


def _resampled_means(differences: Floats, shares: Floats) -> Iterator[Floats]:
    """Weighted means of `NUM_RESAMPLES` samples of n pairs each, drawn with replacement."""
    random = np.random.Generator(np.random.PCG64(_SEED))
    n = len(differences)
    at_once = max(1, _DRAWN_AT_ONCE // n)
    weighted = shares * differences
    for begin in range(0, NUM_RESAMPLES, at_once):
        drawn = random.integers(n, size=(min(at_once, NUM_RESAMPLES - begin), n))
        yield weighted[drawn].sum(axis=1) / shares[drawn].sum(axis=1)
