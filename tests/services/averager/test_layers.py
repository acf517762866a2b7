"""What averaging and recalibration did, layer by layer, against brute force."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from services.averager.layers import ROOT, measure_distances, measure_drift
from services.averager.measuring import try_average
from services.recipes.loader import load_recipe
from support.assessing import Tiny, TinyConfig, tiny_weights
from support.runs import DIGITS
from wa_core.records import MAX_LAYER_CHARS, MAX_LAYERS

if TYPE_CHECKING:
    from collections.abc import Mapping


def noisy(model: nn.Module, *, seed: int) -> dict[str, torch.Tensor]:
    """The model's state with noise on everything that floats."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: value + torch.randn(value.shape, generator=draw) if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }


def norm(tensors: Mapping[str, torch.Tensor], path: str) -> float:
    """The L2 norm of the module's own weight and bias."""
    own = [tensors[name] for name in (f"{path}.weight", f"{path}.bias") if name in tensors]
    return math.sqrt(sum(float(one.double().square().sum()) for one in own))


def test_distances_are_the_norms_of_the_differences() -> None:
    """Every module of a real net with parameters has its own, in the model's order, and buffers count nowhere."""
    model = load_recipe(DIGITS, {"width": 4}, seed=0).build_model()
    averaged, raw = noisy(model, seed=1), noisy(model, seed=2)

    found = measure_distances(model, averaged, raw)

    apart = {name: averaged[name].double() - raw[name].double() for name in raw}
    owners = [path for path, one in model.named_modules() if list(one.parameters(recurse=False))]
    assert [layer.name for layer in found] == owners
    assert "blocks.1.shortcut.0" in owners
    for layer in found:
        assert layer.distance == pytest.approx(norm(apart, layer.name), rel=1e-12)
        assert layer.relative == pytest.approx(norm(apart, layer.name) / norm(raw, layer.name), rel=1e-12)
    assert sum(layer.size for layer in found) == sum(one.numel() for one in model.parameters())


def test_large_tensors_go_block_by_block() -> None:
    """A tensor of more than one block, which no number of blocks divides, has the distance of all its values."""
    model = nn.Linear(1100, 1001)
    averaged, raw = noisy(model, seed=1), noisy(model, seed=2)

    (layer,) = measure_distances(model, averaged, raw)

    apart = {f"it.{name}": averaged[name].double() - raw[name].double() for name in raw}
    assert layer.name == ROOT
    assert layer.distance == pytest.approx(norm(apart, "it"), rel=1e-12)


def test_small_differences_of_low_precision_are_seen() -> None:
    """Weights of bfloat16 are subtracted in float64: neither rounding nor overflow gets in between."""
    model = nn.Linear(100, 100, bias=False).to(torch.bfloat16)
    raw = {"weight": torch.full((100, 100), 3e38, dtype=torch.bfloat16)}
    averaged = {"weight": torch.full((100, 100), 2e38, dtype=torch.bfloat16)}

    (layer,) = measure_distances(model, averaged, raw)

    assert layer.distance == pytest.approx(
        100 * float((raw["weight"].double() - averaged["weight"].double())[0, 0])
    )


def test_zero_weights_have_no_relative_distance() -> None:
    """Where the raw weights are all zero there is nothing to be relative to."""
    model = nn.Linear(2, 2, bias=False)

    (layer,) = measure_distances(model, {"weight": torch.ones(2, 2)}, {"weight": torch.zeros(2, 2)})

    assert (layer.distance, layer.relative, layer.size) == (2.0, None, 4)


def test_tied_weights_count_once() -> None:
    """A weight that two modules share is in the first of them alone."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    raw, averaged = noisy(model, seed=1), noisy(model, seed=2)

    assert [layer.name for layer in measure_distances(model, averaged, raw)] == ["0"]


def test_weights_that_diverged_are_left_out() -> None:
    """A layer with NaN has no distance; the others have theirs."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    raw = noisy(model, seed=1)
    raw["0.bias"] = torch.tensor([1.0, math.nan])

    assert [layer.name for layer in measure_distances(model, noisy(model, seed=2), raw)] == ["1"]


def test_many_layers_are_told_together() -> None:
    """Beyond 512 modules those under one path are one, and the sum of squares stays what it was."""
    model = nn.ModuleList(
        nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}) for _ in range(MAX_LAYERS - 1)
    )
    averaged, raw = noisy(model, seed=1), noisy(model, seed=2)

    found = measure_distances(model, averaged, raw)

    assert [layer.name for layer in found] == [str(number) for number in range(MAX_LAYERS - 1)]
    total = sum(layer.distance**2 for layer in found)
    assert total == pytest.approx(sum(float((averaged[name] - raw[name]).double().square().sum()) for name in raw))
    wider = nn.ModuleList(nn.Linear(1, 1) for _ in range(MAX_LAYERS + 1))
    (only,) = measure_distances(wider, noisy(wider, seed=1), noisy(wider, seed=2))
    assert (only.name, only.size) == (ROOT, 2 * (MAX_LAYERS + 1))


def test_names_without_end_are_cut() -> None:
    """A record stays small whatever modules are called."""
    model = nn.ModuleDict({"x" * 5000: nn.Linear(1, 1)})

    (layer,) = measure_distances(model, noisy(model, seed=1), noisy(model, seed=2))

    assert layer.name == "x" * MAX_LAYER_CHARS


def test_drift_is_what_the_formulas_say() -> None:
    """RMS of shifts in new standard deviations, geometric mean of the variances' ratios; dead channels aside."""
    model = nn.Sequential(nn.BatchNorm1d(3, eps=0.5), nn.ReLU(), nn.BatchNorm1d(3))
    model[0].running_mean = torch.tensor([1.0, 2.0, 3.0])
    model[0].running_var = torch.tensor([3.5, 0.0, 8.0])
    before = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3)).state_dict()
    before["0.running_var"] = torch.tensor([1.75, 0.0, 1.0])

    first, second = measure_drift(model, before)

    shifts = [1 / math.sqrt(4), 2 / math.sqrt(0.5), 3 / math.sqrt(8.5)]
    assert first.mean_shift == pytest.approx(math.sqrt(sum(shift**2 for shift in shifts) / 3))
    assert first.variance_ratio == pytest.approx(math.sqrt(2 * 8))
    assert (second.name, second.mean_shift, second.variance_ratio) == ("2", 0.0, 1.0)


def test_without_any_variance_there_is_no_ratio() -> None:
    """A layer whose channels are all dead has a shift and no ratio."""
    model = nn.BatchNorm1d(2)
    model.running_var = torch.zeros(2)

    (layer,) = measure_drift(model, nn.BatchNorm1d(2).state_dict())

    assert (layer.name, layer.variance_ratio) == (ROOT, None)


def test_drift_is_in_what_is_found_of_an_average() -> None:
    """Recalibration says how far each layer's statistics, mean 0 and variance 1, were off before."""
    recipe = Tiny(TinyConfig())
    model = recipe.build_model()

    trial = try_average(recipe, model, tiny_weights(2.0))

    (layer,) = trial.batchnorm.layers
    inputs = 2 * torch.cat(recipe.calibration_batches()).double()
    mean, variance = inputs.mean(0), inputs.var(0, unbiased=False)
    assert layer.name == "1"
    assert layer.mean_shift == pytest.approx(float((mean.square() / (variance + 1e-5)).mean().sqrt()), rel=1e-5)
    assert layer.variance_ratio == pytest.approx(float(variance.log().mean().exp()), rel=1e-5)


def test_a_model_without_batchnorm_has_no_drift() -> None:
    """Bad input 73: skipped is skipped."""
    assert measure_drift(nn.Linear(2, 2), nn.Linear(2, 2).state_dict()) == []
