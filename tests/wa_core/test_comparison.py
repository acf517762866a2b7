from __future__ import annotations

import itertools
import statistics
from typing import TYPE_CHECKING

import numpy as np
import pytest

from wa_core.comparison import CONFIDENCE, MIN_PAIRS, compare

if TYPE_CHECKING:
    from wa_core.records import Comparison


def verdict(averaged: object, raw: object, **options: object) -> Comparison:
    """A comparison that must be possible."""
    found = compare(np.asarray(averaged, float), np.asarray(raw, float), metric="loss", **options)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_the_interval_is_the_normal_one_where_that_is_exact() -> None:
    """For many pairs the percentile interval is mean ± 1.96 s/√n, the closed form, within a few per cent."""
    difference = np.random.default_rng(1).normal(-0.3, 2.0, size=4000)
    found = verdict(5 + difference, np.full(4000, 5.0))
    half = statistics.NormalDist().inv_cdf(0.975) * difference.std() / np.sqrt(4000)
    assert found.difference == pytest.approx(difference.mean())
    assert found.low == pytest.approx(difference.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(difference.mean() + half, abs=0.06 * half)


def test_the_interval_is_that_of_all_resamples() -> None:
    """For few pairs it agrees with the exact quantiles over every one of the n^n resamples."""
    difference = np.array([-3.0, -1.0, 0.5, 0.25, -2.0, 4.0])
    means = np.array([difference[list(drawn)].mean() for drawn in itertools.product(range(6), repeat=6)])
    found = verdict(difference, np.zeros(6))
    # 2,000 resamples estimate a tail of 2.5 % to within 2.5 % ± 1 % at three standard errors.
    assert np.quantile(means, 0.015) <= found.low <= np.quantile(means, 0.035)
    assert np.quantile(means, 0.965) <= found.high <= np.quantile(means, 0.985)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Over 300 experiments with a known mean it is covered in about 95 % of them."""
    random = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        found = verdict(random.normal(0.2, 1.0, size=60), np.zeros(60))
        covered += found.low <= 0.2 <= found.high
    assert 0.90 <= covered / 300 <= 0.985


def test_pairing_takes_out_what_is_hard_for_both() -> None:
    """A small steady gain is seen through large differences between samples; unpaired it would be a tie."""
    random = np.random.default_rng(3)
    raw = random.exponential(2.0, size=200)
    averaged = raw - 0.05 + random.normal(0, 0.02, size=200)
    assert verdict(averaged, raw).won == "averaged"
    assert verdict(raw, averaged).won == "raw"
    assert verdict(averaged, random.permutation(raw)).won == "tie"


def test_batches_count_by_their_size() -> None:
    """The difference is the mean over samples, however they were batched; equal sizes are as no sizes."""
    averaged, raw = np.array([1.0, 2.0, 3.0, 1.0, 2.0, 9.0]), np.zeros(6)
    sizes = np.array([64.0, 64.0, 64.0, 64.0, 64.0, 8.0])
    found = verdict(averaged, raw, weights=sizes, unit="batch")
    assert found.difference == pytest.approx(np.repeat(averaged, sizes.astype(int)).mean())
    assert (found.num_samples, found.unit, found.confidence) == (6, "batch", CONFIDENCE)
    even = verdict(averaged, raw, weights=np.full(6, 32.0))
    plain = verdict(averaged, raw)
    assert (even.low, even.high) == pytest.approx((plain.low, plain.high))


def test_the_same_pairs_give_the_same_verdict() -> None:
    """Two assessments of the same weights agree to the last bit."""
    values = np.random.default_rng(0).normal(size=(2, 500))
    assert verdict(*values) == verdict(*values)


def test_few_unanimous_pairs_prove_nothing() -> None:
    """Below six pairs even one side winning each of them happens by chance too often (sign test)."""
    assert 2 / 2 ** (MIN_PAIRS - 1) > 1 - CONFIDENCE >= 2 / 2**MIN_PAIRS
    few = np.arange(1.0, MIN_PAIRS)
    assert compare(few, few - 1, metric="loss") is None
    assert verdict(np.arange(6.0), np.arange(6.0) + 1).won == "averaged"


def test_what_cannot_be_paired_is_not_compared() -> None:
    """Sides of different length, or values that are not finite, give no verdict."""
    sound = np.arange(10.0)
    assert compare(sound, sound[:9], metric="loss") is None
    for bad in (np.nan, np.inf):
        assert compare(np.where(sound == 3, bad, sound), sound, metric="loss") is None
        assert compare(np.where(sound == 3, bad, sound), np.where(sound == 3, bad, sound), metric="loss") is None
