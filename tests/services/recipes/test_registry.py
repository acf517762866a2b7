"""The recipe registry: what is refused, and how the message helps."""

from __future__ import annotations

import pytest

from services.recipes.registry import check_recipe, recipe_names, total_steps
from wa_core.errors import InvalidInputError

DIGITS = "services.recipes.digits:Digits"


def test_a_good_config_is_returned_with_its_defaults() -> None:
    """What is not given has the recipe's default."""
    checked = check_recipe(DIGITS, {"epochs": 3})

    assert (checked.epochs, checked.batch_size) == (3, 64)


@pytest.mark.parametrize(
    ("recipe", "config", "code", "message"),
    [
        ("services.recipes.digit:Digits", {}, "unknown_recipe", "services.recipes.digits:Digits"),  # 19
        ("services.recipes.nothing:Here", {}, "unknown_recipe", "the recipes are"),  # 19
        ("os:system", {}, "recipe_not_allowed", "allowed packages"),  # 20
        ("services.recipesx.digits:Digits", {}, "recipe_not_allowed", "allowed packages"),  # 20
        (DIGITS, {"epochs": 0}, "invalid_config", "config.epochs"),  # 22
        (DIGITS, {"epochs": "3"}, "invalid_config", "config.epochs"),
        (DIGITS, {"lr": float("nan")}, "invalid_config", "config.lr"),
        (DIGITS, {"epoch": 3}, "invalid_config", "did you mean 'epochs'"),
        (DIGITS, {"zzz": 3}, "invalid_config", "known fields: epochs"),
    ],
)
def test_a_bad_recipe_or_config_is_refused(
    recipe: str, config: dict[str, object], code: str, message: str
) -> None:
    """19, 20, 22: each is refused with a stable code and a message that says what would be right."""
    with pytest.raises(InvalidInputError) as caught:
        check_recipe(recipe, config)

    assert caught.value.code == code
    assert message in caught.value.message


def test_total_steps_drop_the_last_incomplete_batch() -> None:
    """12 epochs of 1437 samples in batches of 64 are 12 times 22 steps."""
    assert total_steps(DIGITS, {"epochs": 12}) == 264
    assert recipe_names() == ["services.recipes.char_lm:CharLm", DIGITS]
