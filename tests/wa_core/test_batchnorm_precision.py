"""How exact recalibrated statistics are, against float64 brute force."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from support.batchnorm import images, network, snapshot
from wa_core.batchnorm import recalibrate
from wa_core.moments import Moments

if TYPE_CHECKING:
    from collections.abc import Callable


def gaussian(*, mean: float = 0.0) -> Tensor:
    """640 values in 3 channels, as float32."""
    return (mean + torch.randn(640, 3, generator=torch.Generator().manual_seed(7))).float()


def classes() -> Tensor:
    """640 values whose means differ by class, sorted by class."""
    shift = torch.arange(10).repeat_interleave(64)[:, None] * torch.tensor([1.0, 3.0, 5.0])
    return gaussian() + shift


SHUFFLE = torch.randperm(640, generator=torch.Generator().manual_seed(8))
DATA_SETS: dict[str, Callable[[], list[Tensor]]] = {
    "batch 64": lambda: list(gaussian().split(64)),
    "batch 2": lambda: list(gaussian().split(2)),
    "short last batch": lambda: list(gaussian()[:577].split(64)),
    "class-sorted": lambda: list(classes().split(64)),
    "shuffled at batch 4": lambda: list(classes()[SHUFFLE].split(4)),
    "mean/std 1000": lambda: list(gaussian(mean=1e3).split(32)),
    "mean/std 10000": lambda: list(gaussian(mean=1e4).split(32)),
}


@pytest.mark.parametrize("name", DATA_SETS)
@pytest.mark.parametrize("layout", ["rows", "images", "channels last"])
def test_the_variance_is_exact_to_1e7(name: str, layout: str) -> None:
    """On seven data sets and in each memory layout: relative variance error at most 1e-7 of brute force."""
    batches = DATA_SETS[name]()
    whole = torch.cat(batches).double()
    layer: nn.Module = nn.BatchNorm1d(3)
    if layout != "rows":
        layer = nn.BatchNorm2d(3)
        batches = [batch[:, :, None, None].repeat(1, 1, 5, 2) for batch in batches]
    if layout == "channels last":
        batches = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]

    recalibrate(layer, batches)

    mean, variance = whole.mean(0), whole.var(0, correction=0)
    assert isinstance(layer.running_var, Tensor)
    assert isinstance(layer.running_mean, Tensor)
    assert ((layer.running_var.double() - variance) / variance).abs().max() <= 1e-7
    assert ((layer.running_mean.double() - mean) / mean.abs().clamp(min=1)).abs().max() <= 1e-7


def test_large_inputs_are_summed_block_by_block() -> None:
    """Inputs of several blocks, with a part of a block left over, lose nothing in either layout."""
    data = 50 + torch.randn(7, 3, 100, 101)
    for inputs in (data, data.contiguous(memory_format=torch.channels_last), data[:, :, ::2, 1:]):
        found = Moments.of(inputs)
        variance, mean = torch.var_mean(inputs.double(), dim=(0, 2, 3), correction=0)
        assert found.n == inputs.numel() // 3
        assert torch.allclose(found.mean, mean, rtol=1e-14)
        assert torch.allclose(found.variance, variance, rtol=1e-12)


def test_constant_inputs_have_no_variance() -> None:
    """A channel that never changes gets its value as the mean, and a variance of exactly 0."""
    layer = nn.BatchNorm2d(3)
    recalibrate(layer, [torch.full((2, 3, 4, 4), 0.1)] * 3)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.running_mean.tolist() == torch.full((3,), 0.1).tolist()
    assert layer.running_var.tolist() == [0.0] * 3


def test_half_precision_models_normalise_as_in_training() -> None:
    """With bfloat16 weights and buffers, deeper layers see what training shows them, to bfloat16's precision."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)).bfloat16()
    data = (100 + torch.randn(64, 3)).bfloat16()
    with torch.no_grad():
        seen = copy.deepcopy(model)[0](data).double()
    recalibrate(model, [data])
    assert torch.allclose(model[1].running_mean.double(), seen.mean(0), atol=0.03)
    assert torch.allclose(model[1].running_var.double(), seen.var(0, correction=0), rtol=0.06)


def test_a_lazy_layer_that_has_run_is_like_any_other() -> None:
    """After its first forward pass, a lazy layer gets the statistics of its data."""
    model = nn.Sequential(nn.LazyBatchNorm1d())
    model.eval()(torch.zeros(2, 2))
    recalibrate(model, [torch.tensor([[1.0, 5.0], [3.0, 5.0]])])
    assert model[0].running_mean.tolist() == [2.0, 5.0]
    assert model[0].running_var.tolist() == [1.0, 0.0]


def test_instance_norm_gets_the_means_over_instances() -> None:
    """Each instance counts once, with its own mean and population variance, whatever its size; momentum stays."""
    layer = nn.InstanceNorm1d(2, track_running_stats=True, momentum=0.3)
    data = [torch.randn(3, 2, 5) + 4, torch.randn(2, 2, 9), torch.randn(2, 7)]
    report = recalibrate(layer, data)
    instances = [row for batch in data[:2] for row in batch] + [data[2]]
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert torch.allclose(layer.running_mean, torch.stack([row.mean(1) for row in instances]).mean(0), atol=1e-6)
    expected = torch.stack([row.var(1, correction=0) for row in instances]).mean(0)
    assert torch.allclose(layer.running_var, expected, atol=1e-6)
    assert (report.num_layers, layer.momentum, layer.training) == (1, 0.3, True)
    assert layer.num_batches_tracked is not None
    assert layer.num_batches_tracked.item() == 3


def test_update_bn_leaves_instance_norm_alone() -> None:
    """The compatible method knows BatchNorm only, and no momentum leaks into other layers' statistics."""
    model = nn.Sequential(nn.InstanceNorm2d(1, track_running_stats=True), *network())
    before = snapshot(model)
    recalibrate(model, images(4, 4), method="update_bn")
    after = snapshot(model)[0]
    assert all(torch.equal(after[name], before[0][name]) for name in before[0] if name.startswith("0."))


def test_it_stops_when_the_statistics_are_precise_enough() -> None:
    """With a tolerance, the pass ends early, after 8 batches at least, and keeps its promise on shuffled data."""
    draw = torch.Generator().manual_seed(5)
    batches = [torch.randn(64, 3, generator=draw) * 2 + 1 for _ in range(400)]
    layer = nn.BatchNorm1d(3)
    report = recalibrate(layer, batches, tolerance=0.02)
    assert report.is_stopped_early
    assert 8 < report.num_batches < 400
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert ((layer.running_mean - 1).abs() / 2).max() < 3 * 0.02
    assert (layer.running_var / 4 - 1).abs().max() < 3 * 0.02

    assert recalibrate(nn.BatchNorm1d(2), [torch.ones(4, 2)] * 20, tolerance=0.5).num_batches == 8
    assert not recalibrate(nn.BatchNorm1d(3), batches[:20], tolerance=1e-6).is_stopped_early


def test_a_sequential_pass_agrees_with_evaluation() -> None:
    """Layer after layer: each layer's statistics are the exact moments of its inputs in evaluation mode."""
    model, batches = network().eval(), images(5, 2, 9)
    report = recalibrate(model, batches, sequential=True)
    with torch.no_grad():
        seen = torch.cat([model[:6](batch) for batch in batches]).double()
    assert torch.allclose(model[6].running_mean.double(), seen.mean(0), rtol=1e-6, atol=1e-7)
    assert torch.allclose(model[6].running_var.double(), seen.var(0, correction=0), rtol=1e-6)
    assert (report.num_layers, report.num_batches, report.num_samples) == (2, 3, 16)

    other = network()
    recalibrate(other, batches)
    assert torch.equal(other[1].running_var, model[1].running_var)
    assert not torch.allclose(other[6].running_var, model[6].running_var, rtol=1e-3)
