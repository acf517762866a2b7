"""docs/format.md names a test for each rule; each of them must exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "format.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", PAGE)))
RULES = re.findall(r"(?ms)^\*\*.*?(?=\n\n|\Z)", PAGE.partition("## Rules")[2])


def test_many_tests_are_named() -> None:
    """The page is a specification: it is held by tests."""
    assert len(NAMED) >= 30


@pytest.mark.parametrize("named", NAMED)
def test_each_named_test_exists(named: str) -> None:
    """The file is there, and it defines the test."""
    path, _, name = named.partition("::")
    assert re.search(rf"^\s*(def {name}\(|{name} = )", (ROOT / path).read_text(), re.MULTILINE)


@pytest.mark.parametrize("rule", RULES, ids=[rule.split(".**")[0].strip("* ") for rule in RULES])
def test_each_rule_names_a_test(rule: str) -> None:
    """No rule is only words."""
    assert "`tests/" in rule
