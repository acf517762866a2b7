"""Rules against closed forms."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.rules import LERP_RULES
from wa_core.averaging.rules import (
    AnyRule,
    EmaRule,
    PowerEmaRule,
    Rule,
    SwaRule,
    next_coefficients,
    parse_rule,
    parse_run_rule,
    require_lerp,
)
from wa_core.averaging.windows import WindowRule
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
@given(rule=LERP_RULES, gaps=st.lists(st.integers(1, 10**6), min_size=1, max_size=30))
def test_coefficients_always_sum_to_one(rule: Rule, gaps: list[int]) -> None:
    """Whatever the rule and the intervals, the first weight is exactly 1 and the coefficients sum to 1."""
    steps = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    found = coefficients_of(rule, steps)
    assert rule.weight(n_averaged=0, step=steps[0], prev_step=None) == 1.0
    assert all(0 <= value <= 1 for value in found.values())
    assert math.fsum(found.values()) == pytest.approx(1.0, abs=1e-12)


@settings(deadline=None)
@given(rule=LERP_RULES, gaps=st.lists(st.integers(1, 10**6), min_size=1, max_size=30))
def test_the_coefficient_vector_is_what_folding_gives(rule: Rule, gaps: list[int]) -> None:
    """A rule's coefficients for a list of steps are those of folding them one by one."""
    steps = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    found = rule.coefficients(steps)
    assert list(found) == steps
    assert found == pytest.approx(coefficients_of(rule, steps), rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("rule", [SwaRule(start_step=40), PowerEmaRule(sigma_rel=0.1, start_step=40)])
def test_steps_before_the_start_are_left_out(rule: Rule) -> None:
    """The coefficient vector has the steps that count and no others; without any it is empty."""
    assert rule.coefficients(IRREGULAR) == pytest.approx(coefficients_of(rule, IRREGULAR[3:]))
    assert rule.coefficients([1, 2]) == rule.coefficients([]) == {}


@pytest.mark.parametrize(("steps", "code"), [([2, 1], "step_backwards"), ([1, 1], "step_backwards")])
@pytest.mark.parametrize("rule", [SwaRule(start_step=5), WindowRule(last=1)])
def test_steps_out_of_order_are_refused(rule: AnyRule, steps: list[int], code: str) -> None:
    """68: a list of steps that does not ascend is refused, whether or not they count."""
    with pytest.raises(InvalidInputError, match="ascending") as caught:
        rule.coefficients(steps)
    assert caught.value.code == code


@pytest.mark.parametrize("steps", [[-1], [1.5], ["3"], [True], [2**63]])
def test_what_is_no_step_is_refused(steps: list[int]) -> None:
    """A step that is no whole number from 0 on is refused, whatever the rule."""
    for rule in (SwaRule(), WindowRule(last=1)):
        with pytest.raises(InvalidInputError, match="whole numbers"):
            rule.coefficients(steps)


def test_the_coefficients_of_a_long_run_are_exact() -> None:
    """Each of 20,000 SWA coefficients is 1 / n to 13 digits."""
    found = SwaRule().coefficients(range(20_000))
    assert list(found.values()) == pytest.approx([1 / 20_000] * 20_000, rel=1e-13)


@pytest.mark.parametrize("steps", [REGULAR, IRREGULAR])
@pytest.mark.parametrize("start_step", [0, 2])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_power_ema_matches_its_closed_form(steps: list[int], start_step: int, sigma_rel: float) -> None:
    """A checkpoint weighs the part of t**gamma that falls on the steps it stands for."""
    rule = PowerEmaRule(sigma_rel=sigma_rel, start_step=start_step)
    power = rule.gamma + 1
    marks = [((step - start_step) / (steps[-1] - start_step)) ** power for step in (start_step, *steps)]
    assert_close(coefficients_of(rule, steps), [after - before for before, after in pairwise(marks)])


def test_power_ema_at_every_step_is_the_paper_s() -> None:
    """At a gap of one step the decay is the paper's beta(t) = (1 - 1/t)**(gamma + 1)."""
    rule = PowerEmaRule(sigma_rel=0.1)
    for t in (2, 10, 1000, 10**6):
        beta = (1 - 1 / t) ** (rule.gamma + 1)
        assert 1 - rule.weight(n_averaged=t - 1, step=t, prev_step=t - 1) == pytest.approx(beta, rel=1e-12)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (12**-0.5, 0.0)])
def test_gamma_is_the_paper_s(sigma_rel: float, gamma: float) -> None:
    """sigma_rel 0.05 and 0.10 are the paper's gammas 16.97 and 6.94; the largest sigma_rel is the plain mean."""
    assert PowerEmaRule(sigma_rel=sigma_rel).gamma == pytest.approx(gamma, abs=5e-3)


@settings(deadline=None)
@given(st.floats(1e-9, 12**-0.5))
def test_gamma_gives_sigma_rel_back(sigma_rel: float) -> None:
    """The profile t**gamma has the standard deviation that was asked for, relative to the run."""
    gamma = PowerEmaRule(sigma_rel=sigma_rel).gamma
    assert math.sqrt(gamma + 1) / (gamma + 2) / math.sqrt(gamma + 3) == pytest.approx(sigma_rel, rel=1e-9)


def test_the_profile_of_a_long_run_has_the_width_that_was_asked_for() -> None:
    """Measured on the coefficients themselves, the standard deviation over the run's length is sigma_rel."""
    steps = range(1, 10_001)
    found = PowerEmaRule(sigma_rel=0.12).coefficients(steps)
    mean = math.fsum(value * step for step, value in found.items())
    variance = math.fsum(value * (step - mean) ** 2 for step, value in found.items())
    assert math.sqrt(variance) / 10_000 == pytest.approx(0.12, rel=1e-3)


def warmed_decays(rule: EmaRule, number: int) -> list[float]:
    """TensorFlow's decays of the first folds, as it documents them."""
    assert rule.decay is not None
    assert rule.warmup is not None
    return [min(rule.decay, (1 + n) / (rule.warmup + n)) for n in range(number)]


@pytest.mark.parametrize("number", [1, 2, 5, 20, 200])
@pytest.mark.parametrize(("decay", "warmup"), [(0.9, 10), (0.99, 10), (0.5, 10), (0.05, 10), (0.999, 3), (0.9, 2)])
def test_a_warmed_up_decay_is_unbiased(decay: float, warmup: int, number: int) -> None:
    """The average is the zero-started one over the mass that it has gathered, by brute force."""
    rule, mass, shadow = EmaRule(decay=decay, warmup=warmup), 0.0, [0.0] * number
    for n, d in enumerate(warmed_decays(rule, number)):
        shadow = [d * value for value in shadow]
        shadow[n], mass = 1 - d, d * mass + 1 - d
    assert_close(coefficients_of(rule, list(range(number))), [value / mass for value in shadow])


def test_a_warmed_up_decay_from_the_first_is_tensorflow_s() -> None:
    """With init=first each later fold decays by min(decay, (1 + n) / (10 + n))."""
    rule = EmaRule(decay=0.9, warmup=10, init="first")
    decays = warmed_decays(rule, 200)
    found = [1 - rule.weight(n_averaged=n, step=n, prev_step=n - 1) for n in range(1, 200)]
    assert found == pytest.approx(decays[1:], rel=1e-12)
    assert decays[-1] == 0.9


def test_the_gentlest_warm_up_is_swa() -> None:
    """With (1 + n) / (2 + n) the unbiased average is the running mean, until the decay takes over."""
    found = EmaRule(decay=0.999, warmup=2).coefficients(REGULAR)
    assert list(found.values()) == pytest.approx([1 / len(REGULAR)] * len(REGULAR), rel=1e-12)


@pytest.mark.parametrize("init", ["debias", "first"])
def test_a_ramped_up_half_life_is_the_limit_of_small_steps(init: str) -> None:
    """It is EDM's min(half_life, rampup * steps) integrated: ever smaller steps come to the same."""
    half_life, rampup, marks = 50.0, 0.3, [10, 60, 170, 180, 400]
    left = 1.0
    expected: list[float] = []
    for before, after in reversed(list(pairwise([0, *marks]))):
        pieces = [before + (after - before) * (i + 0.5) / 20_000 for i in range(20_000)]
        area = math.fsum(1 / min(half_life, rampup * u) for u in pieces) * (after - before) / 20_000
        decay = 2**-area if before else 0.0
        expected.insert(0, left * (1 - decay))
        left *= decay

    found = EmaRule(half_life_steps=half_life, rampup=rampup, init=init).coefficients(marks)  # type: ignore[arg-type]

    assert list(found.values()) == pytest.approx(expected, rel=1e-4)
    assert math.fsum(found.values()) == pytest.approx(1.0, abs=1e-12)


def test_a_ramp_up_does_not_depend_on_the_checkpoint_interval() -> None:
    """The checkpoints of 100 steps together weigh as much as one checkpoint for these 100 steps."""
    rule = EmaRule(half_life_steps=300, rampup=0.1, start_step=50)
    fine = rule.coefficients(range(51, 5051))
    coarse = rule.coefficients(range(150, 5051, 100))
    grouped = [math.fsum(fine[s] for s in range(step - 99, step + 1)) for step in coarse]
    assert list(coarse.values()) == pytest.approx(grouped, rel=1e-9, abs=1e-300)


def test_a_finished_ramp_up_is_a_plain_half_life() -> None:
    """Long after half_life / rampup steps a fold weighs what it would without the ramp-up."""
    for prev_step in (10_000, 20_000):
        weights = [
            EmaRule(half_life_steps=500, rampup=rampup).weight(
                n_averaged=9, step=prev_step + 100, prev_step=prev_step
            )
            for rampup in (None, 0.05)
        ]
        assert weights[0] == pytest.approx(weights[1], rel=1e-5)


def test_a_rule_counts_from_its_start_step() -> None:
    """Steps before start_step do not count, start_step itself does, and weighing an uncounted step is refused."""
    rule = SwaRule(start_step=100)
    assert [rule.counts(step) for step in (0, 99, 100, 101)] == [False, False, True, True]
    with pytest.raises(InvalidInputError, match="before start_step 100"):
        rule.weight(n_averaged=0, step=99, prev_step=None)


@pytest.mark.parametrize(("n_averaged", "step", "prev_step"), [(1, 20, 20), (1, 19, 20), (1, 20, None), (0, 5, 6)])
@pytest.mark.parametrize(
    "rule",
    [
        SwaRule(),
        EmaRule(half_life_steps=5),
        EmaRule(half_life_steps=5, rampup=0.1),
        EmaRule(decay=0.5),
        EmaRule(decay=0.5, warmup=10),
        PowerEmaRule(sigma_rel=0.1),
    ],
)
def test_a_step_that_does_not_go_forward_is_refused(
    rule: Rule, n_averaged: int, step: int, prev_step: int | None
) -> None:
    """68: a step at or before the last fold's is refused with the code step_backwards."""
    with pytest.raises(InvalidInputError, match="does not go forward") as caught:
        rule.weight(n_averaged=n_averaged, step=step, prev_step=prev_step)
    assert caught.value.code == "step_backwards"


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
        (
            "ema:rampup=.05,half_life=500",
            EmaRule(half_life_steps=500, rampup=0.05),
            "ema:half_life=500,rampup=0.05",
        ),
        ("ema:decay=0.999,warmup=10", EmaRule(decay=0.999, warmup=10), "ema:decay=0.999,warmup=10"),
        ("power:sigma_rel=0.10", PowerEmaRule(sigma_rel=0.1), "power:sigma_rel=0.1"),
        (
            "power:start_step=100,sigma_rel=0.05",
            PowerEmaRule(sigma_rel=0.05, start_step=100),
            "power:sigma_rel=0.05,start_step=100",
        ),
        ("window:last=8", WindowRule(last=8), "window:last=8"),
        ("window:last=8,shape=uniform", WindowRule(last=8), "window:last=8"),
        ("window:shape=linear,last=8", WindowRule(last=8, shape="linear"), "window:last=8,shape=linear"),
        (
            "window:last_steps=1000,shape=minus_sqrt,start_step=10",
            WindowRule(last_steps=1000, shape="minus_sqrt", start_step=10),
            "window:last_steps=1000,shape=minus_sqrt,start_step=10",
        ),
        (
            "window:last_fraction=0.20,shape=cosine",
            WindowRule(last_fraction=0.2, shape="cosine"),
            "window:last_fraction=0.2,shape=cosine",
        ),
        ("lawa:last=8", WindowRule(last=8), "window:last=8"),
        ("lawa:last_fraction=1", WindowRule(last_fraction=1.0), "window:last_fraction=1"),
    ],
)
def test_rules_are_read_and_spelled(text: str, rule: AnyRule, spelling: str) -> None:
    """Every way to write a rule gives that rule, and one canonical spelling."""
    assert parse_rule(text) == rule
    assert rule.spelling == parse_rule(text).spelling == spelling


def test_a_window_is_no_lerp_rule() -> None:
    """Who folds checkpoint by checkpoint gets every rule but windows; the refusal says what to do instead."""
    rule = PowerEmaRule(sigma_rel=0.1)
    assert require_lerp(rule) is rule
    with pytest.raises(InvalidInputError, match="wa average … --rule window:last=8,shape=cosine") as caught:
        require_lerp(parse_rule("window:shape=cosine,last=8"))
    assert caught.value.code == "not_a_lerp_rule"


def test_a_running_run_has_no_fraction() -> None:
    """Who follows a run gets every rule but windows over a part of it; the refusal shows what to say instead."""
    assert parse_run_rule("lawa:last=8") == WindowRule(last=8)
    assert parse_run_rule("swa") == SwaRule()
    with pytest.raises(InvalidInputError, match="window:last_steps=1000") as caught:
        parse_run_rule("window:last_fraction=0.2")
    assert caught.value.code == "needs_total_steps"
    assert "wa average … --rule window:last_fraction=0.2" in caught.value.message
    with pytest.raises(InvalidInputError, match="known rules"):
        parse_run_rule("median")


def test_a_step_is_folded_once_only() -> None:
    """The coefficients refuse a step that is already there, and a weight outside [0, 1]."""
    with pytest.raises(InvalidInputError, match="counts once"):
        next_coefficients({5: 1.0}, step=5, weight=0.5)
    with pytest.raises(InvalidInputError, match="in \\[0, 1\\]"):
        next_coefficients({5: 1.0}, step=6, weight=math.nan)
