"""The digits recipe: fixed data, randomness from its arguments alone, honest metrics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from services.recipes import digits_config
from services.recipes.digits import Digits
from services.recipes.loader import load_recipe
from services.recipes.registry import RECIPES

DIGITS = "services.recipes.digits:Digits"


@pytest.fixture(scope="module")
def digits() -> Digits:
    """The recipe with its default config."""
    recipe = load_recipe(DIGITS, {}, seed=0)
    assert isinstance(recipe, Digits)
    return recipe


def test_train_and_heldout_data_are_disjoint_and_stratified(digits: Digits) -> None:
    """No held-out image is trained on, sizes are as registered, and every digit is in both parts alike."""
    train = [batch for batch, _ in digits.calibration_batches()]
    heldout = [batch for batch, _ in digits.heldout_batches()]
    rows = {tuple(image.flatten().tolist()) for batch in train for image in batch}
    labels = torch.cat([labels for _, labels in digits.heldout_batches()])

    assert digits.num_train_samples == sum(map(len, train)) == RECIPES[DIGITS].num_train_samples
    assert sum(map(len, heldout)) == digits_config.NUM_HELDOUT_SAMPLES
    assert not any(tuple(image.flatten().tolist()) in rows for batch in heldout for image in batch)
    assert torch.bincount(labels).tolist() == pytest.approx([36] * 10, abs=2)


def test_batches_depend_on_indices_and_generator_alone(digits: Digits) -> None:
    """The same generator state gives the same augmentation, whatever torch's global generator did."""
    indices = torch.arange(32)
    torch.manual_seed(1)
    first = digits.train_batch(indices, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    second = digits.train_batch(indices, generator=torch.Generator().manual_seed(5))
    other = digits.train_batch(indices, generator=torch.Generator().manual_seed(6))

    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (32, 1, 8, 8)


def test_the_rate_warms_up_and_then_stays(digits: Digits) -> None:
    """The schedule rises linearly to `lr` and is constant from there to the end."""
    optimizer = digits.build_optimizer(nn.Linear(1, 1))
    scheduler = digits.build_scheduler(optimizer, total_steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()

    assert rates[0] == pytest.approx(0.1 / 21)
    assert rates[:20] == sorted(rates[:20])
    assert set(rates[20:]) == {0.1}


def test_evaluation_is_exact_and_restores_modes(digits: Digits) -> None:
    """Means are over samples, not batches, and modules get back the mode that each had."""
    model = digits.build_model()
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    frozen.eval()
    everything = [tuple(map(torch.cat, zip(*digits.heldout_batches(), strict=True)))]

    whole = digits.evaluate(model, everything)
    in_batches = digits.evaluate(model, digits.heldout_batches())

    each = digits.evaluate_each(model, digits.heldout_batches())

    assert in_batches == pytest.approx(whole, rel=1e-6)
    assert {name: float(values.mean()) for name, values in each.items()} == in_batches
    assert {values.shape for values in each.values()} == {(digits_config.NUM_HELDOUT_SAMPLES,)}
    assert 0 <= whole["accuracy"] <= 1
    assert model.training
    assert not frozen.training


def test_modes_are_restored_when_the_model_raises(digits: Digits) -> None:
    """A failing evaluation leaves the training mode as it was."""

    class Broken(nn.Module):
        def forward(self, _images: Tensor) -> Tensor:
            raise ZeroDivisionError

    model = Broken().train()

    with pytest.raises(ZeroDivisionError):
        digits.evaluate(model, digits.heldout_batches())
    assert model.training
