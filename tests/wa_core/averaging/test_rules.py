"""Rules against closed forms; the parser against what people type."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wa_core.averaging.rules import EmaRule, Rule, SwaRule, next_coefficients, parse_rule
from wa_core.errors import InvalidInputError

REGULAR = list(range(20, 420, 20))
IRREGULAR = [3, 4, 9, 40, 41, 100, 137, 500, 501, 777]


def coefficients_of(rule: Rule, steps: list[int]) -> dict[int, float]:
    """Fold `steps` in order, as a shadow would."""
    found: dict[int, float] = {}
    prev_step = None
    for step in steps:
        weight = rule.weight(n_averaged=len(found), step=step, prev_step=prev_step)
        found, prev_step = next_coefficients(found, step=step, weight=weight), step
    return found


def assert_close(found: dict[int, float], expected: list[float]) -> None:
    """Equal to closed forms, and summing to 1."""
    assert list(found.values()) == pytest.approx(expected, rel=1e-12)
    assert math.fsum(found.values()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("steps", [REGULAR, IRREGULAR])
def test_swa_gives_every_checkpoint_the_same_weight(steps: list[int]) -> None:
    """An SWA coefficient is 1 / n, at whatever intervals the checkpoints come."""
    assert_close(coefficients_of(SwaRule(), steps), [1 / len(steps)] * len(steps))


@pytest.mark.parametrize("start_step", [0, 2])
@pytest.mark.parametrize("steps", [REGULAR, IRREGULAR])
def test_half_life_ema_matches_its_closed_form(steps: list[int], start_step: int) -> None:
    """A checkpoint weighs d^(age) times the mass of the steps it stands for, over the mass of all steps."""
    d = 2 ** (-1 / 60)
    before = [start_step, *steps]
    mass = 1 - d ** (steps[-1] - start_step)
    expected = [d ** (steps[-1] - s) * (1 - d ** (s - b)) / mass for b, s in pairwise(before)]

    found = coefficients_of(EmaRule(half_life_steps=60, start_step=start_step), steps)

    assert_close(found, expected)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_decay_ema_matches_its_closed_form(decay: float) -> None:
    """With a decay per fold the coefficients are (1-d) d^age / (1 - d^n)."""
    n = len(IRREGULAR)
    expected = [(1 - decay) * decay**age / (1 - decay**n) for age in reversed(range(n))]
    assert_close(coefficients_of(EmaRule(decay=decay), IRREGULAR), expected)


def test_init_first_decays_from_the_first_checkpoint() -> None:
    """With init=first the first checkpoint weighs d^(n-1), as in torch.optim.swa_utils."""
    d, n = 0.9, len(REGULAR)
    expected = [d ** (n - 1), *((1 - d) * d**age for age in reversed(range(n - 1)))]
    assert_close(coefficients_of(EmaRule(decay=d, init="first"), REGULAR), expected)


def test_init_first_with_a_half_life_follows_the_gaps() -> None:
    """With init=first and a half-life each fold decays by the steps that passed."""
    rule = EmaRule(half_life_steps=10, init="first")
    assert rule.weight(n_averaged=3, step=30, prev_step=20) == pytest.approx(0.5, rel=1e-15)
    assert rule.weight(n_averaged=3, step=40, prev_step=20) == pytest.approx(0.75, rel=1e-15)


@pytest.mark.parametrize("half_life", [1e9, 1e15, 1e18])
def test_very_long_half_lives_keep_their_accuracy(half_life: float) -> None:
    """A weight near a decay of 1 agrees with 50-digit arithmetic to 14 digits."""
    with localcontext() as context:
        context.prec = 50
        log_d = -Decimal(2).ln() / Decimal(half_life)
        expected = (1 - (log_d * 7).exp()) / (1 - (log_d * 100).exp())
    found = EmaRule(half_life_steps=half_life).weight(n_averaged=5, step=100, prev_step=93)
    assert found == pytest.approx(float(expected), rel=1e-14)


@settings(deadline=None)
@given(
    rule=st.one_of(
        st.builds(SwaRule),
        st.builds(EmaRule, half_life_steps=st.floats(1e-300, 1e18), init=st.sampled_from(["debias", "first"])),
        st.builds(EmaRule, decay=st.floats(0, 1, exclude_max=True), init=st.sampled_from(["debias", "first"])),
    ),
    gaps=st.lists(st.integers(1, 10**6), min_size=1, max_size=30),
)
def test_coefficients_always_sum_to_one(rule: Rule, gaps: list[int]) -> None:
    """Whatever the rule and the intervals, the first weight is exactly 1 and the coefficients sum to 1."""
    steps = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    found = coefficients_of(rule, steps)
    assert rule.weight(n_averaged=0, step=steps[0], prev_step=None) == 1.0
    assert all(0 <= value <= 1 for value in found.values())
    assert math.fsum(found.values()) == pytest.approx(1.0, abs=1e-12)


def test_a_rule_counts_from_its_start_step() -> None:
    """Steps before start_step do not count, start_step itself does, and weighing an uncounted step is refused."""
    rule = SwaRule(start_step=100)
    assert [rule.counts(step) for step in (0, 99, 100, 101)] == [False, False, True, True]
    with pytest.raises(InvalidInputError, match="before start_step 100"):
        rule.weight(n_averaged=0, step=99, prev_step=None)


@pytest.mark.parametrize(("n_averaged", "step", "prev_step"), [(1, 20, 20), (1, 19, 20), (1, 20, None), (0, 5, 6)])
@pytest.mark.parametrize("rule", [SwaRule(), EmaRule(half_life_steps=5), EmaRule(decay=0.5)])
def test_a_step_that_does_not_go_forward_is_refused(
    rule: Rule, n_averaged: int, step: int, prev_step: int | None
) -> None:
    """68: a step at or before the last fold's is refused with the code step_backwards."""
    with pytest.raises(InvalidInputError, match="does not go forward") as caught:
        rule.weight(n_averaged=n_averaged, step=step, prev_step=prev_step)
    assert caught.value.code == "step_backwards"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"half_life_steps": 5, "decay": 0.5},
        *({"decay": value} for value in (-0.1, 1.0, 1.5, "0.9", True, math.nan, math.inf, 10**400)),
        *({"half_life_steps": value} for value in (0, -1, math.nan, math.inf, "60", True, 10**400)),
        *({"decay": 0.5, "start_step": value} for value in (-1, 1.5, "3", True, None, 2**63)),
        {"decay": 0.5, "init": "zero"},
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


@pytest.mark.parametrize(
    ("text", "rule", "spelling"),
    [
        ("swa", SwaRule(), "swa"),
        ("swa:start_step=0", SwaRule(), "swa"),
        ("swa:start_step=100", SwaRule(start_step=100), "swa:start_step=100"),
        ("ema:half_life=60", EmaRule(half_life_steps=60), "ema:half_life=60"),
        ("ema:half_life=60.50", EmaRule(half_life_steps=60.5), "ema:half_life=60.5"),
        (
            "ema:start_step=100,half_life=60",
            EmaRule(half_life_steps=60, start_step=100),
            "ema:half_life=60,start_step=100",
        ),
        (
            "ema:decay=0.99,init=first,start_step=10",
            EmaRule(decay=0.99, init="first", start_step=10),
            "ema:decay=0.99,start_step=10,init=first",
        ),
    ],
)
def test_rules_are_read_and_spelled(text: str, rule: Rule, spelling: str) -> None:
    """Every way to write a rule gives that rule, and one canonical spelling."""
    assert parse_rule(text) == rule
    assert rule.spelling == parse_rule(text).spelling == spelling


@settings(deadline=None)
@given(
    st.one_of(
        st.builds(SwaRule, start_step=st.integers(0, 2**63 - 1)),
        st.builds(EmaRule, half_life_steps=st.floats(1e-300, 1e18), start_step=st.integers(0, 10**9)),
        st.builds(EmaRule, decay=st.floats(0, 1, exclude_max=True), init=st.sampled_from(["debias", "first"])),
    )
)
def test_spelling_a_rule_loses_nothing(rule: Rule) -> None:
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


def test_a_step_is_folded_once_only() -> None:
    """The coefficients refuse a step that is already there, and a weight outside [0, 1]."""
    with pytest.raises(InvalidInputError, match="counts once"):
        next_coefficients({5: 1.0}, step=5, weight=0.5)
    with pytest.raises(InvalidInputError, match="in \\[0, 1\\]"):
        next_coefficients({5: 1.0}, step=6, weight=math.nan)
