"""The char_lm recipe: its text, its split, its tie and what it measures."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from services.recipes import char_lm_config
from services.recipes.char_lm import CharLm, read_text
from services.recipes.loader import load_recipe
from services.recipes.registry import RECIPES
from wa_core.errors import InvalidInputError

CHAR_LM = "services.recipes.char_lm:CharLm"
# Of the version in constraints.txt.
TEXT_SHA256 = "4ec52e500e59ec38af1b6fb2611d8d66c1cc56bcb1e22fcb848a9b9a812f1b44"


@pytest.fixture(scope="module")
def char_lm() -> CharLm:
    """A small one."""
    recipe = load_recipe(CHAR_LM, {"width": 32, "layers": 1}, seed=0)
    assert isinstance(recipe, CharLm)
    return recipe


def test_the_text_is_what_it_was() -> None:
    """Everybody with the same scikit-learn trains on the same text."""
    assert hashlib.sha256(read_text().encode()).hexdigest() == TEXT_SHA256


def test_train_and_heldout_text_are_disjoint(char_lm: CharLm) -> None:
    """No held-out stretch is trained on, and sizes are as registered."""
    train = torch.cat(list(char_lm.calibration_batches()))
    heldout = torch.cat(list(char_lm.heldout_batches()))
    seen = {tuple(row) for row in train.tolist()}

    assert train.shape == (char_lm_config.NUM_TRAIN_SAMPLES, char_lm_config.CONTEXT + 1)
    assert char_lm.num_train_samples == RECIPES[CHAR_LM].num_train_samples == len(train)
    assert len(heldout) == char_lm_config.NUM_HELDOUT_SAMPLES
    assert not any(tuple(row) in seen for row in heldout.tolist())


def test_a_character_is_predicted_from_those_before_it(char_lm: CharLm) -> None:
    """Changing a later character changes no earlier prediction."""
    model = char_lm.build_model().eval()
    text = next(char_lm.heldout_batches())[:1]
    changed = text.clone()
    changed[:, 40:] = 0

    before, after = (char_lm.forward(model, batch) for batch in (text, changed))

    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


def test_the_head_is_the_embedding(char_lm: CharLm) -> None:
    """The two are one tensor under two names, and there is no BatchNorm."""
    model = char_lm.build_model()
    state = model.state_dict()

    assert state["head.weight"].data_ptr() == state["characters.weight"].data_ptr()
    assert not any("running_mean" in name for name in state)


def test_measures_are_means_over_stretches(char_lm: CharLm) -> None:
    """An untrained model knows nothing: about log2(96) bits a character; and the modes are restored."""
    torch.manual_seed(0)
    model = char_lm.build_model().train()

    metrics = char_lm.evaluate(model, char_lm.heldout_batches())
    each = char_lm.evaluate_each(model, char_lm.heldout_batches())

    assert metrics["bits_per_char"] == pytest.approx(math.log2(96), rel=0.1)
    assert metrics["loss"] == pytest.approx(metrics["bits_per_char"] * math.log(2))
    assert {values.shape for values in each.values()} == {(char_lm_config.NUM_HELDOUT_SAMPLES,)}
    assert model.training


def test_heads_must_share_the_width() -> None:
    """A width that the heads cannot share is refused by name before anything runs."""
    with pytest.raises(InvalidInputError, match="multiple of heads"):
        load_recipe(CHAR_LM, {"width": 33}, seed=0)
