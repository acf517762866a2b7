"""Rules as people write them: the parser, its inverse, and options that make no rule."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.rules import LERP_RULES
from wa_core.averaging.rules import (
    AnyRule,
    EmaRule,
    PowerEmaRule,
    SwaRule,
    parse_rule,
)
from wa_core.averaging.windows import WindowRule
from wa_core.errors import InvalidInputError


@settings(deadline=None)
@given(
    st.one_of(
        LERP_RULES,
        st.builds(SwaRule, start_step=st.integers(0, 2**63 - 1)),
        st.builds(PowerEmaRule, sigma_rel=st.floats(1e-9, 0.28), start_step=st.integers(0, 10**9)),
        st.builds(WindowRule, last=st.integers(1, 10**9), shape=st.sampled_from(["uniform", "linear", "cosine"])),
        st.builds(WindowRule, last_fraction=st.floats(1e-18, 1), start_step=st.integers(0, 10**9)),
    )
)
def test_spelling_a_rule_loses_nothing(rule: AnyRule) -> None:
    """Parsing the canonical spelling gives an equal rule."""
    assert parse_rule(rule.spelling) == rule


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sva", "did you mean 'swa'"),
        ("EMA:decay=0.9", "did you mean 'ema'"),
        ("median", "known rules: 'swa'"),
        ("", "known rules"),
        ("ema", "exactly one of them"),
        ("ema:decay=0.9,half_life=3", "exactly one of them"),
        ("ema:", "nothing follows the colon"),
        ('ema:decay="0.9"', "without quotes"),
        ("ema:decay= 0.9", "plain number"),
        ("ema:decay=", "plain number"),
        ("ema:decay=nan", "plain number"),
        ("ema:decay=1_0", "plain number"),
        ("ema:decay=-0.1", "in \\[0, 1\\)"),
        ("ema:decay=1.0", "in \\[0, 1\\)"),
        ("ema:half_life=0", "above 0"),
        ("ema:half_life=1e999", "finite"),
        ("ema:hafl_life=60", "did you mean 'half_life'"),
        ("ema:decay=0.9,", "no option ''"),
        ("ema:decay", "plain number"),
        ("ema:decay=0.9,decay=0.8", "given twice"),
        ("ema:decay=0.9,init=", "init=first"),
        ("ema:decay=0.9,init=zero", "'debias' or 'first'"),
        ("swa:start_step=1.5", "whole number"),
        ("swa:start_step=-5", "from 0"),
        ("swa:decay=0.9", "takes start_step="),
        ("swa:start_step=" + "9" * 19, "from 0 to"),
        ("ema:decay=0.9,warmup=1", "from 2 to 1000000, such as warmup=10"),
        ("ema:decay=0.9,warmup=1.5", "whole number"),
        ("ema:decay=0.9,rampup=0.05", "write warmup=10"),
        ("ema:half_life=9,warmup=10", "write rampup=0.05"),
        ("power", "write 'power:sigma_rel=0.1'"),
        ("power:start_step=3", "write 'power:sigma_rel=0.1'"),
        ("power:sigma_rel=0.3", "at most 0.288675"),
        ("power:sigma=0.1", "did you mean 'sigma_rel'"),
        ("pwoer:sigma_rel=0.1", "did you mean 'power'"),
        ("window", "write for example 'window:last=8'"),
        ("window:last=0", "from 1 on, such as last=8"),
        ("window:last=8,last_steps=100", "exactly one of them, not last=8, last_steps=100"),
        ("window:last=8,shape=sqrt", "one of uniform, linear, minus_sqrt, cosine"),
        ("window:last=8,shape=", "write shape=uniform"),
        ("window:last_fraction=2", "at most 1, such as last_fraction=0.2"),
        ("lawa:last=8,shape=linear", "takes last="),
        ("lawa", "write for example"),
        ("x" * 10_000, "at most 200 characters"),
    ],
)
def test_what_is_no_rule_is_refused_with_the_right_spelling(text: str, says: str) -> None:
    """23, 24: a misspelled rule is refused in one line that shows what to write."""
    with pytest.raises(InvalidInputError, match=says) as caught:
        parse_rule(text)
    assert len(caught.value.message) < 700
    assert "\n" not in caught.value.message


@settings(deadline=None)
@given(st.text(max_size=60))
def test_no_text_breaks_the_parser(text: str) -> None:
    """Any text is a rule or an InvalidInputError, never anything else."""
    try:
        parse_rule("ema:" + text)
        parse_rule(text)
    except InvalidInputError:
        pass


@pytest.mark.parametrize("sigma_rel", [0, -0.1, 0.2887, 1, math.nan, math.inf, "0.1", True, None, 10**400])
def test_impossible_power_rules_are_refused(sigma_rel: float) -> None:
    """A sigma_rel outside (0, 1 / sqrt(12)] is refused."""
    with pytest.raises(InvalidInputError, match="sigma_rel"):
        PowerEmaRule(sigma_rel=sigma_rel)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"half_life_steps": 5, "decay": 0.5},
        *({"decay": value} for value in (-0.1, 1.0, 1.5, "0.9", True, math.nan, math.inf, 10**400)),
        *({"half_life_steps": value} for value in (0, -1, math.nan, math.inf, "60", True, 10**400)),
        *({"decay": 0.5, "start_step": value} for value in (-1, 1.5, "3", True, None, 2**63)),
        {"decay": 0.5, "init": "zero"},
        {"decay": 0.5, "rampup": 0.05},
        {"half_life_steps": 5, "warmup": 10},
        *({"decay": 0.5, "warmup": value} for value in (0, 1, 2.5, "10", True, 10**7)),
        *({"half_life_steps": 5, "rampup": value} for value in (0, -1, 1e9, math.nan, math.inf, "0.05", True)),
    ],
)
def test_impossible_ema_rules_are_refused(options: dict[str, object]) -> None:
    """23, 24: impossible decays, half-lives, starts and combinations raise InvalidInputError, a ValueError."""
    with pytest.raises(InvalidInputError) as caught:
        EmaRule(**options)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("start_step", [-1, 2.0, "3", True, None])
def test_impossible_swa_starts_are_refused(start_step: object) -> None:
    """A start_step that is no whole number from 0 on is refused."""
    with pytest.raises(InvalidInputError, match="start_step"):
        SwaRule(start_step=start_step)  # type: ignore[arg-type]
