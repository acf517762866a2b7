from __future__ import annotations

import inspect
import re

import wa_core.errors
from wa_core.errors import InvalidInputError, StoreUnavailableError, WeightAveragingError

CLASSES = {
    found.__name__: found
    for _, found in inspect.getmembers(wa_core.errors, inspect.isclass)
    if issubclass(found, WeightAveragingError)
}


def drawn_tree() -> dict[str, str | None]:
    """Class name -> parent name, as the module's docstring draws it."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in (wa_core.errors.__doc__ or "").splitlines():
        if found := re.match(r"^    ([│├└─ ]*)(\w+Error)\b", line):
            depth = len(found[1]) // 4
            parents[found[2]] = path[depth - 1] if depth else None
            path[depth:] = [found[2]]
    return parents


def test_the_drawn_tree_is_the_real_one() -> None:
    """The tree in the docstring has every class, each below its real parent."""
    real = {
        name: found.__bases__[0].__name__ if found is not WeightAveragingError else None
        for name, found in CLASSES.items()
    }

    assert drawn_tree() == real


def test_every_class_has_its_own_kind() -> None:
    """Kinds are stable names, one to a class, so that one table maps them to HTTP."""
    kinds = [found.kind for found in CLASSES.values()]

    assert len(set(kinds)) == len(kinds)
    assert all(re.fullmatch(r"[a-z][a-z_]*", kind) for kind in kinds)


def test_the_code_is_the_kind_unless_given() -> None:
    """An error carries its message and a code: its own, or its kind."""
    plain, finer = StoreUnavailableError("away"), InvalidInputError("bad", code="decay_out_of_range")

    assert (str(plain), plain.message, plain.code) == ("away", "away", "store_unavailable")
    assert finer.code == "decay_out_of_range"
    assert isinstance(finer, ValueError)
