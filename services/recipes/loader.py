"""Builds the recipe that a run names. Imports torch and user code; who must not is served by `registry`.

A run's package is imported from a folder, in Ray workers and assess children alone: processes that hold nothing
but their own run. What goes wrong in it is the user's to mend, and the error says where.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from pydantic import ValidationError

from services.recipes.registry import check_recipe, invalid_config
from wa_core.errors import InvalidInputError, UserCodeError
from wa_core.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from types import ModuleType


def load_recipe(recipe: str, config: Mapping[str, object], *, seed: int, code: Path | None = None) -> Recipe:
    """Import `recipe` (``package.module:Class``) and build it.

    Args:
        recipe: a built-in recipe; or, with `code`, a module and a class in that folder.
        config: what its `Config` is made of.
        seed: the run's.
        code: where the run's package is unpacked (`wa_core.catalog.packages.unpack_package`).

    Raises:
        InvalidInputError: as `services.recipes.registry.check_recipe`; the same codes for a package's recipe.
        UserCodeError: the package's module raised while it was imported, or its recipe while it was built.
    """
    if code is None:
        checked = check_recipe(recipe, config)
        module, _, name = recipe.partition(":")
        return cast("type[Recipe]", getattr(importlib.import_module(module), name))(checked, seed=seed)
    found = _recipe_class(recipe, code)
    try:
        checked = found.Config.model_validate(dict(config))
    except ValidationError as error:
        raise invalid_config(recipe, error, known=list(found.Config.model_fields)) from None
    with _blamed_on(f"{recipe}: building it"):
        return found(checked, seed=seed)


def _recipe_class(recipe: str, code: Path) -> type[Recipe]:
    module_name, _, name = recipe.partition(":")
    module = _import(module_name, code)
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Recipe)):
        raise InvalidInputError(
            f"{recipe}: {name!r} is {'not there' if found is None else 'no subclass of wa_core.recipe.Recipe'}",
            code="unknown_recipe",
        )
    return found


def _import(name: str, code: Path) -> ModuleType:
    # At the end of the path, so that nothing in a package takes the place of what is installed.
    if str(code) not in sys.path:
        sys.path.append(str(code))
    importlib.invalidate_caches()
    with _blamed_on(f"importing {name}"):
        module = importlib.import_module(name)
    if not str(getattr(module, "__file__", None) or "").startswith(f"{code}/"):
        raise InvalidInputError(
            f"{name!r} is also the name of a module that is installed where the run is trained; give the one in "
            f"the package another name",
            code="module_name_taken",
        )
    return module


@contextmanager
def _blamed_on(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise UserCodeError(f"{what} raised {type(error).__name__}: {error}") from error
