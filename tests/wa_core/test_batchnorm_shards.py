"""BatchNorm moments, collected in shards: they merge to those of a single pass."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from support.batchnorm import assert_unchanged, images, network, snapshot
from wa_core.batchnorm import apply_moments, collect_moments, merge_moments, recalibrate
from wa_core.errors import EmptyCalibrationError, InvalidInputError
from wa_core.moments import InstanceMoments, Moments


@pytest.mark.parametrize("num_shards", [1, 2, 3, 9])
def test_shards_merge_to_the_single_pass(num_shards: int) -> None:
    """Moments collected apart, merged and applied equal the single pass; an empty shard does no harm."""
    expected, found = network(), network()
    batches = images(4, 4, 1, 7, 2, 5)
    recalibrate(expected, batches)
    before = snapshot(found)

    shards = [collect_moments(found, batches[shard::num_shards]) for shard in range(num_shards)]
    assert_unchanged(found, before)
    apply_moments(found, merge_moments(shards))

    for name, value in expected.state_dict().items():
        assert torch.allclose(found.state_dict()[name].double(), value.double(), rtol=2e-7, atol=1e-12)
    assert found[1].num_batches_tracked.item() == 6


def test_collecting_is_deterministic() -> None:
    """The same shards in the same order give the same bits."""
    one, two = (merge_moments([collect_moments(network(), images(9, 3))] * 2) for _ in range(2))
    for name, moments in one.items():
        assert torch.equal(moments.mean, two[name].mean)
        assert torch.equal(moments.m2, two[name].m2)


def test_moments_that_do_not_fit_are_refused() -> None:
    """Moments of another architecture, of nothing or of NaN change no layer."""
    model = network()
    before = snapshot(model)
    good = collect_moments(model, images(4))
    with pytest.raises(EmptyCalibrationError):
        apply_moments(model, merge_moments([]))
    with pytest.raises(InvalidInputError, match="'9', which is no such layer"):
        apply_moments(model, {**good, "9": good["1"]})
    with pytest.raises(InvalidInputError, match="5 channels for '1'"):
        apply_moments(model, {"1": good["6"]})
    with pytest.raises(InvalidInputError, match="NaN"):
        apply_moments(model, {**good, "6": Moments(4, good["6"].mean * math.nan, good["6"].m2)})
    assert_unchanged(model, before)
    apply_moments(nn.Linear(1, 1), {})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 2**31), st.booleans())
def test_moments_of_shards_merge_to_those_of_the_whole(sizes: list[int], seed: int, is_nested: bool) -> None:  # noqa: FBT001
    """Moments computed apart and merged, in either direction or as a tree, equal those of all data together."""
    torch.manual_seed(seed)
    shards = [500 + torch.randn(size, 3) for size in sizes]
    whole = torch.cat(shards).double()
    for order in (shards, shards[::-1]):
        parts = [Moments.of(shard) for shard in order]
        while len(parts) > 1:
            last = parts.pop() if is_nested else parts.pop(1)
            into = -1 if is_nested else 0
            parts[into] = parts[into].merge(last)
        merged = parts[0]
        assert (merged.n, merged.num_batches) == (len(whole), len(shards))
        if merged.n:
            assert torch.allclose(merged.mean, whole.mean(0), rtol=1e-13)
            assert torch.allclose(merged.variance, whole.var(0, correction=0), rtol=1e-10, atol=1e-12)


def test_instance_moments_merge() -> None:
    """Instances of several shards count alike, and nothing merges to nothing."""
    data = torch.randn(7, 2, 4)
    merged = InstanceMoments.of(data[:0]).merge(InstanceMoments.of(data[:2])).merge(InstanceMoments.of(data[2:]))
    whole = InstanceMoments.of(data)
    assert torch.allclose(merged.mean, whole.mean)
    assert torch.allclose(merged.variance, whole.variance)
    assert (merged.n, merged.num_batches) == (7, 3)
