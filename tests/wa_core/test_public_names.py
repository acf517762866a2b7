"""The names that `wa_core` itself offers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import wa_core


@pytest.mark.parametrize("name", wa_core.__all__)
def test_every_public_name_is_there(name: str) -> None:
    """Whatever `__all__` lists can be imported from the package."""
    assert getattr(wa_core, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name fails as in any module."""
    with pytest.raises(AttributeError, match="no attribute 'SwaRul'"):
        wa_core.SwaRul  # type: ignore[attr-defined]  # noqa: B018


def test_a_rule_costs_no_torch() -> None:
    """`from wa_core import parse_rule` loads neither torch nor boto3."""
    code = "import sys; from wa_core import parse_rule; print({'torch', 'boto3'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()"
