"""The built-in recipes and their configs, known without torch: this is what the API validates against.

Without a package only recipes listed here can run; a path outside `ALLOWED_PACKAGES` is refused before anything
is imported. Recipes of packages are not known here: they are imported where they run (`services.recipes.loader`).
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from pydantic import ValidationError

from services.recipes import char_lm_config, digits_config
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_core import ErrorDetails

    from wa_core.records import RecipeConfig

ALLOWED_PACKAGES = ("services.recipes.",)
_MAX_FAULTS = 20  # that are described; a config may have thousands
_MAX_SHOWN = 100  # characters of a field's name that are repeated


@dataclass(frozen=True, slots=True)
class RecipeEntry:
    """What is known of a recipe without importing it."""

    config: type[RecipeConfig]
    num_train_samples: int


RECIPES: dict[str, RecipeEntry] = {
    "services.recipes.char_lm:CharLm": RecipeEntry(
        char_lm_config.CharLmConfig, num_train_samples=char_lm_config.NUM_TRAIN_SAMPLES
    ),
    "services.recipes.digits:Digits": RecipeEntry(
        digits_config.DigitsConfig, num_train_samples=digits_config.NUM_TRAIN_SAMPLES
    ),
}


def recipe_names() -> list[str]:
    """The recipes that can be submitted."""
    return sorted(RECIPES)


def check_recipe(recipe: str, config: Mapping[str, object]) -> RecipeConfig:
    """Validate a recipe's path and config.

    Raises:
        InvalidInputError: with code ``recipe_not_allowed``, ``unknown_recipe`` or ``invalid_config``.
    """
    try:
        return _find(recipe).config.model_validate(dict(config))
    except ValidationError as error:
        raise invalid_config(recipe, error, known=list(RECIPES[recipe].config.model_fields)) from None


def invalid_config(recipe: str, error: ValidationError, *, known: list[str]) -> InvalidInputError:
    """What is wrong with a recipe's config, for people; `known` are the names of its fields."""
    found = error.errors(include_url=False)[:_MAX_FAULTS]
    problems = "; ".join(_describe(problem, known=known) for problem in found)
    return InvalidInputError(f"{recipe}: {problems}", code="invalid_config")


def total_steps(recipe: str, config: Mapping[str, object]) -> int:
    """How many steps a run of `recipe` takes; every epoch drops its last incomplete batch.

    Raises:
        InvalidInputError: as `check_recipe`.
    """
    checked = check_recipe(recipe, config)
    return checked.epochs * steps_per_epoch(RECIPES[recipe].num_train_samples, batch_size=checked.batch_size)


def steps_per_epoch(num_train_samples: int, *, batch_size: int) -> int:
    """Whole batches in one pass over the data; one when the data are fewer than a batch."""
    return max(1, num_train_samples // batch_size)


def _find(recipe: str) -> RecipeEntry:
    if not recipe.startswith(ALLOWED_PACKAGES):
        raise InvalidInputError(
            f"recipe {recipe!r} is outside the allowed packages; recipes must be in "
            f"{', '.join(package.rstrip('.') for package in ALLOWED_PACKAGES)}: {', '.join(recipe_names())}",
            code="recipe_not_allowed",
        )
    if recipe not in RECIPES:
        nearest = get_close_matches(recipe, RECIPES, n=1, cutoff=0.6)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise InvalidInputError(
            f"there is no recipe {recipe!r}; {hint}the recipes are: {', '.join(recipe_names())}",
            code="unknown_recipe",
        )
    return RECIPES[recipe]


def _describe(problem: ErrorDetails, *, known: list[str]) -> str:
    path = ".".join(["config", *(str(part)[:_MAX_SHOWN] for part in problem["loc"])])
    if problem["type"] != "extra_forbidden":
        return f"{path}: {problem['msg']}"
    nearest = get_close_matches(str(problem["loc"][-1])[:_MAX_SHOWN], known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known fields: {', '.join(known)}"
    return f"{path}: unknown field; {hint}"
