"""What WeightAverage accepts, casts, ignores and refuses."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch.optim import SGD

from support.optimizers import (
    network,
    train,
)
from wa_core.errors import InvalidInputError
from wa_core.optimizer import WeightAverage


@pytest.mark.parametrize(
    "arguments",
    [
        {"wa_start": -1, "wa_freq": 5}, {"wa_start": -1}, {"wa_start": -0.5, "wa_freq": 1},
        {"wa_start": 1, "wa_freq": 0}, {"wa_freq": 0}, {"wa_start": 1, "wa_freq": 0.5},
        {"wa_start": 1, "wa_freq": 2, "wa_lr": -1e-4}, {"wa_lr": -1.0}, {"wa_lr": math.nan}, {"wa_lr": "0.1"},
        {"wa_start": 1, "wa_freq": 2, "wa_lr": math.inf}, {"wa_lr": True},
        {"wa_start": "soon", "wa_freq": 1}, {"wa_start": math.nan, "wa_freq": 1}, {"wa_start": [1], "wa_freq": 1},
        {"wa_start": 1, "wa_freq": math.inf},
        {"mode": 1.0}, {"mode": -0.1}, {"mode": 1.5}, {"mode": 1}, {"mode": math.nan}, {"mode": 10**400},
        {"mode": True}, {"mode": False}, {"mode": "ema"}, {"mode": "SWA"}, {"mode": "0.9"}, {"mode": ""},
        {"mode": None}, {"mode": [0.9]}, {"mode": torch.tensor(0.9)},
    ],
)  # fmt: skip
def test_impossible_arguments_are_value_errors(arguments: dict[str, Any]) -> None:
    """Every value outside its range raises, never warns first, and leaves the inner optimizer as it was."""
    inner = SGD(network().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="must be") as caught:
        WeightAverage(inner, **arguments)
    assert isinstance(caught.value, InvalidInputError)
    assert any(repr(value) in str(caught.value) for value in arguments.values())
    assert "n_avg" not in inner.param_groups[0]


@pytest.mark.parametrize("wrong", [None, [], network(), WeightAverage(SGD(network().parameters(), lr=0.1))])
def test_only_an_unwrapped_optimizer_can_be_wrapped(wrong: object) -> None:
    """Anything else, and a second wrapper that would count in the same groups, is refused."""
    with pytest.raises(InvalidInputError, match=r"pass a torch\.optim\.Optimizer"):
        WeightAverage(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "says", "expected"),
    [
        ({"wa_start": 5}, ["wa_start is ignored alone, and the mode is manual"], (None, None, None)),
        ({"wa_freq": 5}, ["wa_freq is ignored alone, and the mode is manual"], (None, None, None)),
        ({"wa_lr": 0.1}, ["wa_lr=0.1 is ignored in manual mode"], (None, None, None)),
        ({"wa_start": 5, "wa_lr": 0.1}, ["wa_start is ignored", "wa_lr=0.1 is ignored"], (None, None, None)),
        ({"wa_start": 1.5, "wa_freq": 2}, ["wa_start is 1.5.*taken as 1"], (1, 2, None)),
        ({"wa_start": 1, "wa_freq": 2.0}, ["wa_freq is 2.0.*taken as 2"], (1, 2, None)),
        ({"wa_start": "3", "wa_freq": 2, "wa_lr": 1}, ["wa_start is '3'.*taken as 3"], (3, 2, 1.0)),
        ({"wa_start": 1.5, "wa_freq": 2.5}, ["taken as 1", "taken as 2"], (1, 2, None)),
    ],
)
def test_what_is_cast_or_ignored_warns(
    arguments: dict[str, Any], says: list[str], expected: tuple[int | None, int | None, float | None]
) -> None:
    """One warning for each thing, pointing at the caller's line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = WeightAverage(SGD(network().parameters(), lr=0.1), **arguments)
    assert [warning.category for warning in caught] == [UserWarning] * len(says)
    assert {warning.filename for warning in caught} == {__file__}
    for warning, pattern in zip(caught, says, strict=True):
        with pytest.raises(UserWarning, match=pattern):
            raise warning.message  # type: ignore[misc]
    assert (optimizer.wa_start, optimizer.wa_freq, optimizer.wa_lr) == expected
    assert optimizer.is_automatic == (expected[0] is not None)


def test_manual_mode_ignores_the_learning_rate() -> None:
    """In manual mode wa_lr is never applied."""
    model = network()
    with pytest.warns(UserWarning, match="ignored in manual mode"):
        optimizer = WeightAverage(SGD(model.parameters(), lr=0.1), wa_lr=0.5)
    train(model, optimizer, range(3))
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    "arguments", [{}, {"wa_start": 0, "wa_freq": 1}, {"wa_start": 0, "wa_freq": 1, "mode": 0}]
)
def test_right_arguments_warn_about_nothing(arguments: dict[str, Any]) -> None:
    """Warnings are errors here; the usual calls raise none."""
    assert WeightAverage(SGD(network().parameters(), lr=0.1), **arguments).param_groups[0]["n_avg"] == 0
