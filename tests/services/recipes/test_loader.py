"""Recipes from packages: imported from their folder, and what is wrong with them told to their writer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from services.recipes.loader import load_recipe
from wa_core.errors import InvalidInputError, UserCodeError, WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Iterator

MOONS = Path(__file__).parents[3] / "examples" / "moons"
BAD = """
from wa_core.recipe import Recipe
class NoRecipe: ...
class Unbuildable(Recipe): ...
"""


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test imports is not there for the next one."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in ("moons", "bad_package", "broken_package"):
        sys.modules.pop(name, None)


def test_a_packages_recipe_is_built_with_its_own_config() -> None:
    """Its class, its config and its defaults."""
    recipe = load_recipe("moons:Moons", {"epochs": 3}, seed=5, code=MOONS)

    assert (type(recipe).__name__, recipe.epochs, recipe.batch_size, recipe.seed) == ("Moons", 3, 64, 5)


@pytest.mark.parametrize(
    ("recipe", "config", "kind", "message"),
    [
        ("moons:Moons", {"epoch": 3}, InvalidInputError, "config.epoch: unknown field; did you mean 'epochs'"),
        ("moons:Moons", {"epochs": 0}, InvalidInputError, "config.epochs"),
        ("moons:Suns", {}, InvalidInputError, "'Suns' is not there"),
    ],
)
def test_what_a_submission_gets_wrong_is_said_as_for_built_in_recipes(
    recipe: str, config: dict[str, object], kind: type[WeightAveragingError], message: str
) -> None:
    """A config that does not fit and a class that is not there."""
    with pytest.raises(kind, match=message):
        load_recipe(recipe, config, seed=0, code=MOONS)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("bad_package:NoRecipe", "no subclass of wa_core.recipe.Recipe"),
        ("bad_package:Unbuildable", "building it raised TypeError: Can't instantiate abstract class"),
        ("broken_package:Any", "importing broken_package raised ZeroDivisionError"),
        ("missing_package:Any", "importing missing_package raised ModuleNotFoundError"),
        ("json:JSONDecoder", "name of a module that is installed"),
    ],
)
def test_what_user_code_does_wrong_is_blamed_on_it(tmp_path: Path, recipe: str, message: str) -> None:
    """Code that raises, is no recipe, or hides behind an installed module's name."""
    (tmp_path / "bad_package.py").write_text(BAD)
    (tmp_path / "broken_package.py").write_text("1 / 0")
    (tmp_path / "json.py").write_text(BAD)

    with pytest.raises((InvalidInputError, UserCodeError), match=message):
        load_recipe(recipe, {}, seed=0, code=tmp_path)
