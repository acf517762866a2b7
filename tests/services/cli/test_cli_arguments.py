"""What users type becomes what the service is sent."""

from __future__ import annotations

import pytest
import typer

from services.cli.arguments import parse_averages, parse_config, parse_labels, parse_recipe


def test_a_short_name_is_the_built_in_recipe() -> None:
    """`digits` is enough; a full path is taken as it is."""
    assert parse_recipe("digits") == "services.recipes.digits:Digits"
    assert parse_recipe("my.package:Recipe") == "my.package:Recipe"


def test_values_that_are_json_are_taken_as_such() -> None:
    """Numbers are numbers and words are words, without quotes to escape."""
    items = ["epochs=12", "lr=1e-1", "nesterov=true", "name=plain words", "text='a'", "none=null", "expr=a=b"]

    assert parse_config(items) == {
        "epochs": 12,
        "lr": 0.1,
        "nesterov": True,
        "name": "plain words",
        "text": "'a'",
        "none": None,
        "expr": "a=b",
    }


def test_numbers_that_json_does_not_have_stay_text() -> None:
    """NaN never becomes a number, so the service can refuse it by name."""
    assert parse_config(["lr=NaN"]) == {"lr": "NaN"}


def test_an_average_is_named_by_its_kind_or_by_the_user() -> None:
    """A rule alone is called after its kind; `name=rule` is called as the user says."""
    assert parse_averages(["swa:start_step=100", "mine=ema:half_life=60", "ema:half_life=30"]) == [
        {"name": "swa", "rule": "swa:start_step=100"},
        {"name": "mine", "rule": "ema:half_life=60"},
        {"name": "ema", "rule": "ema:half_life=30"},
    ]


def test_names_given_by_kind_never_collide() -> None:
    """Two rules of one kind get two names, and neither takes one that the user gave."""
    names = [one["name"] for one in parse_averages(["swa", "swa:start_step=10", "swa-2=swa", "swa:start_step=20"])]

    assert names == ["swa", "swa-3", "swa-2", "swa-4"]


def test_windows_are_averages_too() -> None:
    """A window by checkpoints or steps can be submitted; of one over a part of the run the way is shown."""
    assert parse_averages(["lawa:last=8"]) == [{"name": "lawa", "rule": "lawa:last=8"}]
    with pytest.raises(typer.BadParameter, match=r"wa average … --rule window:last_fraction=0\.2"):
        parse_averages(["window:last_fraction=0.2"])


@pytest.mark.parametrize("item", ["key", "=value", ""])
def test_a_pair_without_key_or_equals_sign_is_refused(item: str) -> None:
    """The refusal shows the text and the form that is wanted."""
    with pytest.raises(typer.BadParameter, match="key=value"):
        parse_labels([item])
