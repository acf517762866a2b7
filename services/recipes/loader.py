"""Builds the recipe that a run names. Imports torch; processes that must not are served by `registry`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from services.recipes.registry import check_recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wa_core.recipe import Recipe


def load_recipe(recipe: str, config: Mapping[str, object], *, seed: int) -> Recipe:
    """Import `recipe` (``package.module:Class``) and build it.

    Raises:
        InvalidInputError: as `services.recipes.registry.check_recipe`.
    """
    checked = check_recipe(recipe, config)
    module, _, name = recipe.partition(":")
    found = cast("type[Recipe]", getattr(import_module(module), name))
    return found(checked, seed=seed)
