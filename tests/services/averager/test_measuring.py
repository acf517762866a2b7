"""What is measured of weights, in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from services.averager.measuring import (
    compare_measured,
    data_digest,
    finite,
    measure,
    measure_weights,
    try_average,
)
from support.assessing import NUM_HELDOUT, Tiny, TinyConfig, tiny_weights
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable


def tiny() -> Tiny:
    """The small recipe."""
    return Tiny(TinyConfig())


class WholeBatches(Tiny):
    """A recipe that does not tell samples apart."""

    def evaluate(self, model: nn.Module, batches: Iterable[torch.Tensor]) -> dict[str, float]:
        """The mean over samples."""
        return {"loss": float(super().evaluate_each(model, batches)["loss"].mean()), "batches": 1.0}

    def evaluate_each(self, model: nn.Module, batches: Iterable[torch.Tensor]) -> None:  # type: ignore[override]
        """Nothing."""


class Odd(Tiny):
    """A recipe whose samples are what the test says."""

    each: dict[str, torch.Tensor]

    def evaluate_each(self, model: nn.Module, batches: object) -> dict[str, torch.Tensor]:
        """Those."""
        return self.each


class Calibrated(Tiny):
    """A recipe with other calibration data and another model."""

    batches: tuple[torch.Tensor, ...] = ()
    model: nn.Module | None = None

    def build_model(self) -> nn.Module:
        """The given model, or the usual one."""
        return self.model or super().build_model()

    def calibration_batches(self) -> list[torch.Tensor]:
        """The given ones."""
        return list(self.batches)


def test_samples_are_the_pairs_where_the_recipe_tells_them_apart() -> None:
    """One value per held-out sample; the metrics are their means, as `evaluate` gives them."""
    recipe = tiny()
    found = measure_weights(recipe, recipe.build_model(), tiny_weights(2.0))
    assert (len(found.values), found.unit) == (NUM_HELDOUT, "sample")
    model = recipe.build_model()
    model.load_state_dict(tiny_weights(2.0))
    assert found.metrics == recipe.evaluate(model, recipe.heldout_batches())
    with torch.no_grad():
        outputs = torch.cat([model.eval()(batch) for batch in recipe.heldout_batches()])
    assert found.values == pytest.approx(outputs.double().square().mean(dim=1).numpy())


def test_batches_are_the_pairs_where_it_does_not() -> None:
    """Each batch is measured by itself and counts by its size; the metrics are of all the data at once."""
    recipe = WholeBatches(TinyConfig())
    found = measure(recipe, recipe.build_model())
    assert found.unit == "batch"
    assert found.weights is not None
    assert found.weights.tolist() == [10, 10, 4]
    assert found.metrics == {
        "loss": pytest.approx(np.average(found.values, weights=found.weights)),
        "batches": 1.0,
    }


@pytest.mark.parametrize(
    "each",
    [
        {"accuracy": torch.ones(3)},
        {"loss": torch.ones(3, 2)},
        {"loss": torch.tensor(1.0)},
        {"loss": torch.ones(0)},
    ],
)
def test_values_that_are_no_samples_are_refused(each: dict[str, torch.Tensor]) -> None:
    """Without a loss, or with anything but one value per sample, the message says what was given."""
    recipe = Odd(TinyConfig())
    recipe.each = each
    with pytest.raises(InvalidInputError, match="evaluate_each gave"):
        measure(recipe, recipe.build_model())


def test_a_measurement_does_not_depend_on_the_one_before() -> None:
    """Averages measured one after the other on one model come out as each alone."""
    recipe, model = tiny(), tiny().build_model()
    one, other = try_average(recipe, model, tiny_weights(2.0)), try_average(recipe, model, tiny_weights(0.5))
    for scale, found in ((2.0, one), (0.5, other)):
        alone = try_average(recipe, recipe.build_model(), tiny_weights(scale))
        assert found.before == alone.before
        assert found.after is not None
        assert alone.after is not None
        assert found.after.values.tolist() == alone.after.values.tolist()
        assert torch.equal(found.buffers["1.running_mean"], alone.buffers["1.running_mean"])


def test_recalibration_gives_back_changed_statistics_only() -> None:
    """The statistics are those of the calibration data, float64 by hand; nothing else comes back."""
    recipe = tiny()
    found = try_average(recipe, recipe.build_model(), tiny_weights(2.0))
    inputs = 2 * torch.cat(recipe.calibration_batches()).double()
    assert found.buffers.keys() == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert torch.allclose(found.buffers["1.running_mean"].double(), inputs.mean(0), atol=1e-5)
    assert torch.allclose(found.buffers["1.running_var"].double(), inputs.var(0, correction=0), rtol=1e-5)


def test_72_empty_calibration_data_is_an_answer() -> None:
    """72: `calibration_failed` with the weights measured as they are, and no buffers to serve."""
    recipe = Calibrated(TinyConfig())
    found = try_average(recipe, recipe.build_model(), tiny_weights())
    assert (found.batchnorm.status, found.batchnorm.code) == ("failed", "calibration_failed")
    assert found.before["loss"] > 0
    assert (found.after, found.buffers) == (None, {})


def test_calibration_with_nan_is_an_answer() -> None:
    """Weights whose activations are NaN get `calibration_failed`; the model goes on to the next average."""
    recipe, model = tiny(), tiny().build_model()
    broken = try_average(recipe, model, tiny_weights() | {"0.bias": torch.full((3,), float("nan"))})
    assert broken.batchnorm.code == "calibration_failed"
    assert finite(broken.before) == {}
    assert try_average(recipe, model, tiny_weights()).batchnorm.status == "recalibrated"


def test_73_a_model_without_batchnorm_skips_recalibration() -> None:
    """73: recalibration is skipped and the report says so; the average is measured all the same."""
    recipe = Calibrated(TinyConfig())
    recipe.model = nn.Sequential(nn.Linear(3, 3))
    found = try_average(recipe, recipe.model, recipe.model.state_dict())
    assert found.batchnorm.status == "skipped"
    assert "no BatchNorm" in found.batchnorm.message
    assert found.after is not None
    assert found.after.metrics == found.before


def test_buffers_that_no_checkpoint_holds_are_left_alone() -> None:
    """A model with a buffer that is not persistent is assessed like any other."""
    recipe = Calibrated(TinyConfig())
    recipe.batches = (torch.randn(8, 3),)
    recipe.model = tiny().build_model()
    recipe.model.register_buffer("cache", torch.zeros(2), persistent=False)
    found = try_average(recipe, recipe.model, tiny_weights())
    assert "cache" not in found.buffers
    assert found.batchnorm.status == "recalibrated"


def test_a_comparison_needs_both_sides() -> None:
    """Without raw weights, or when the average could not be measured, there is no verdict."""
    recipe, model = tiny(), tiny().build_model()
    good = measure_weights(recipe, model, tiny_weights(0.1))
    bad = measure_weights(recipe, model, tiny_weights(9.0))
    assert compare_measured(good, None) is None
    assert compare_measured(None, good) is None
    found = compare_measured(good, bad)
    assert found is not None
    assert (found.won, found.num_samples, found.metric) == ("averaged", NUM_HELDOUT, "loss")


def digest_of(*batches: Any) -> str:
    """The digest of a recipe with these calibration batches."""
    recipe = Calibrated(TinyConfig())
    recipe.batches = batches
    return data_digest(recipe)


def test_the_data_s_digest_tells_data_apart() -> None:
    """One changed value, dtype, shape, key or order gives another digest; the same data the same."""
    base = torch.arange(6.0)
    variants = [
        (base,),
        (base + torch.tensor([0, 0, 0, 0, 0, 1e-6]),),
        (base.double(),),
        (base.reshape(2, 3),),
        (base.int(),),
        (base[:3], base[3:]),
        (base[3:], base[:3]),
        ({"x": base},),
        ({"y": base},),
        ((base, 1),),
        ((base, 2),),
        (base.numpy(), base.numpy()),
        (),
    ]
    digests = [digest_of(*batches) for batches in variants]
    assert len(set(digests)) == len(variants)
    assert digests == [digest_of(*batches) for batches in variants]
    assert digest_of(base.numpy()) == digest_of(base)
