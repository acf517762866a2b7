"""Post-hoc averages against closed forms, independent solvers and the exact cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wa_core.averaging.posthoc import Kept, RebuildPlan, plan_rebuild
from wa_core.averaging.rules import EmaRule, PowerEmaRule, SwaRule
from wa_core.averaging.windows import WindowRule
from wa_core.errors import InvalidInputError

STEPS = list(range(4, 1028, 4))


def snapshots(sigma_rels: tuple[float, ...], *, number: int) -> list[Kept]:
    """Snapshots of power-function averages, taken `number` times along the way."""
    every = len(STEPS) // number
    return [
        Kept(f"{sigma_rel}@{STEPS[end - 1]}", PowerEmaRule(sigma_rel=sigma_rel).coefficients(STEPS[:end]))
        for sigma_rel in sigma_rels
        for end in range(every, len(STEPS) + 1, every)
    ]


def assert_honest(plan: RebuildPlan, kept: list[Kept], wanted: dict[int, float]) -> None:
    """What a plan says of itself is what adding up gives, by plain loops."""
    vectors = {one.name: one.coefficients for one in kept}
    steps = sorted({*wanted, *(step for vector in vectors.values() for step in vector)})
    found = {
        step: math.fsum(weight * vectors[name].get(step, 0.0) for name, weight in plan.weights.items())
        for step in steps
    }
    error = math.dist(found.values(), [wanted.get(step, 0.0) for step in steps])
    size = math.hypot(*wanted.values())
    assert plan.profile_error == pytest.approx(error / size, rel=1e-6, abs=1e-13)
    assert plan.noise_gain == pytest.approx(sum(map(abs, plan.weights.values())))
    assert math.fsum(plan.weights.values()) == pytest.approx(1.0, abs=1e-10)
    assert [plan.coefficients.get(step, 0.0) for step in steps] == pytest.approx(list(found.values()), abs=1e-12)


@pytest.mark.parametrize(
    ("sigma_rel", "error"), [(0.06, 1e-3), (0.075, 1e-3), (0.125, 2e-3), (0.15, 4e-3), (0.2, 1e-2)]
)
def test_snapshots_of_two_lengths_rebuild_the_lengths_between_and_beyond(sigma_rel: float, error: float) -> None:
    """As in the paper, snapshots of sigma_rel 0.05 and 0.10 give other lengths to a fraction of a per cent."""
    kept = snapshots((0.05, 0.10), number=32)
    wanted = PowerEmaRule(sigma_rel=sigma_rel).coefficients(STEPS)

    plan = plan_rebuild(kept, wanted)

    assert plan.profile_error < error
    assert plan.noise_gain < 4
    assert_honest(plan, kept, wanted)


def test_more_snapshots_rebuild_more_exactly() -> None:
    """The error falls by about a factor of 4 whenever the snapshots come twice as often."""
    wanted = PowerEmaRule(sigma_rel=0.075).coefficients(STEPS)
    errors = [plan_rebuild(snapshots((0.05, 0.10), number=number), wanted).profile_error for number in (8, 16, 32)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


def test_the_error_is_that_of_the_continuous_profiles() -> None:
    """On a fine grid the plan agrees with the paper's solution, from inner products of t**gamma in closed form."""
    ends, wanted_gamma = [250, 500, 750, 1000], PowerEmaRule(sigma_rel=0.12).gamma
    gammas = [PowerEmaRule(sigma_rel=sigma_rel).gamma for sigma_rel in (0.05, 0.10)]
    profiles = [(end, gamma) for gamma in gammas for end in ends]

    def product(one: tuple[int, float], other: tuple[int, float]) -> float:
        # The integral up to the earlier end of both densities (g + 1) t**g / end**(g + 1).
        (end, gamma), (end_2, gamma_2) = one, other
        scale = (gamma + 1) * (gamma_2 + 1) / (gamma + gamma_2 + 1)
        upto = min(end, end_2)
        return scale * (upto / end) ** (gamma + 1) * (upto / end_2) ** (gamma_2 + 1) / upto

    size = len(profiles)
    system = np.ones((size + 1, size + 1))  # bordered by the constraint that the weights sum to 1
    system[:size, :size] = [[product(one, other) for other in profiles] for one in profiles]
    system[size, size] = 0
    right = np.array([*(product(one, (1000, wanted_gamma)) for one in profiles), 1.0])
    expected = np.linalg.solve(system, right)[:size]

    steps = list(range(1, 1001))
    kept = [
        Kept(f"{sigma_rel}@{end}", PowerEmaRule(sigma_rel=sigma_rel).coefficients(steps[:end]))
        for sigma_rel in (0.05, 0.10)
        for end in ends
    ]
    plan = plan_rebuild(kept, PowerEmaRule(sigma_rel=0.12).coefficients(steps), max_error=1.0)

    assert [plan.weights[one.name] for one in kept] == pytest.approx(expected.tolist(), rel=0.01, abs=0.002)


@pytest.mark.parametrize(
    "wanted",
    [
        EmaRule(half_life_steps=100).coefficients(STEPS),
        EmaRule(decay=0.99, warmup=10).coefficients(STEPS),
        PowerEmaRule(sigma_rel=0.03).coefficients(STEPS),
        SwaRule(start_step=500).coefficients(STEPS),
        WindowRule(last=8, shape="minus_sqrt").coefficients(STEPS),
        {STEPS[7]: 1.0},
        {STEPS[3]: 2.0, STEPS[5]: -1.0},
    ],
)
def test_kept_checkpoints_rebuild_anything_exactly(wanted: dict[int, float]) -> None:
    """When all checkpoints are there, any average is rebuilt with its own coefficients and nothing superfluous."""
    kept = [Kept.raw(f"step_{step}", step=step) for step in STEPS]

    plan = plan_rebuild(kept, wanted)

    assert plan.profile_error < 1e-12
    assert plan.noise_gain == pytest.approx(sum(map(abs, wanted.values())))
    assert {name for name, weight in plan.weights.items() if abs(weight) > 1e-9} == {
        f"step_{step}" for step, value in wanted.items() if abs(value) > 1e-9
    }
    if len(wanted) < 10:
        assert len(plan.weights) == len(wanted)


def test_a_window_is_the_difference_of_two_running_means() -> None:
    """Snapshots of a plain mean at steps 500 and 1000 give the mean of what came between, exactly."""
    steps = list(range(10, 1010, 10))
    kept = [Kept(f"swa@{end}", SwaRule().coefficients([s for s in steps if s <= end])) for end in (500, 1000)]

    plan = plan_rebuild(kept, WindowRule(last=50).coefficients(steps))

    assert plan.weights == pytest.approx({"swa@500": -1.0, "swa@1000": 2.0})
    assert plan.profile_error < 1e-12
    assert plan.noise_gain == pytest.approx(3.0)


def test_what_is_kept_twice_is_shared_evenly() -> None:
    """Duplicates and dependent snapshots get the smallest weights that fit, not huge ones that cancel."""
    ema = EmaRule(half_life_steps=100).coefficients(STEPS)
    mixed = {step: 0.5 * value for step, value in ema.items()}
    mixed[STEPS[0]] += 0.5
    kept = [Kept("a", ema), Kept("b", dict(ema)), Kept.raw("first", step=STEPS[0]), Kept("mixed", mixed)]

    plan = plan_rebuild(kept, ema)

    assert plan.profile_error < 1e-12
    assert plan.weights["a"] == pytest.approx(plan.weights["b"])
    assert plan.noise_gain < 2
    assert_honest(plan, kept, ema)


@pytest.mark.parametrize("copies", [1, 3])
def test_one_kept_thing_is_itself_and_nothing_else(copies: int) -> None:
    """From one average alone, that average is rebuilt, and another is refused."""
    vector = SwaRule().coefficients(STEPS)
    kept = [Kept(f"copy {number}", vector) for number in range(copies)]

    assert plan_rebuild(kept, vector).weights == pytest.approx(
        dict.fromkeys([one.name for one in kept], 1 / copies)
    )
    with pytest.raises(InvalidInputError) as caught:
        plan_rebuild(kept, {STEPS[-1]: 1.0})
    assert caught.value.code == "cannot_rebuild"


def test_a_rebuild_that_is_too_far_off_is_refused_with_its_numbers() -> None:
    """Too few snapshots: the refusal says the predicted error and gain, the limits, and what would help."""
    kept = snapshots((0.05, 0.10), number=2)
    with pytest.raises(
        InvalidInputError, match=r"error 0\.\d+ at noise gain \d.* at most 0\.05 and 20 are allowed; keep"
    ):
        plan_rebuild(kept, EmaRule(half_life_steps=5).coefficients(STEPS))
    assert plan_rebuild(kept, EmaRule(half_life_steps=5).coefficients(STEPS), max_error=1.0).profile_error > 0.05


def test_a_rebuild_that_would_amplify_noise_is_refused_or_kept_within_the_limit() -> None:
    """A shorter average than those kept needs weights that cancel: the plan trades error for gain."""
    kept, wanted = snapshots((0.10, 0.15), number=16), PowerEmaRule(sigma_rel=0.04).coefficients(STEPS)
    free = plan_rebuild(kept, wanted, max_error=1.0, max_noise_gain=1e9)
    assert free.noise_gain > 10

    bound = plan_rebuild(kept, wanted, max_error=1.0, max_noise_gain=5)

    assert bound.noise_gain <= 5
    assert bound.profile_error > free.profile_error
    with pytest.raises(InvalidInputError, match=rf"\(or {free.profile_error:.3g} at {free.noise_gain:.3g}\)"):
        plan_rebuild(kept, wanted, max_error=1.01 * free.profile_error, max_noise_gain=5)


def test_a_step_that_nothing_kept_holds_counts_as_error() -> None:
    """What the wanted average weighs and nothing kept contains is missing, and the error says how much."""
    plan = plan_rebuild([Kept.raw("a", step=1)], {1: 0.8, 2: 0.2}, max_error=1.0)
    assert plan.weights == {"a": 1.0}
    assert plan.profile_error == pytest.approx(math.hypot(0.2, 0.2) / math.hypot(0.8, 0.2))


@pytest.mark.parametrize(
    ("kept", "wanted", "says"),
    [
        ([], {1: 1.0}, "nothing is kept"),
        ([Kept.raw("a", step=1), Kept.raw("a", step=2)], {1: 1.0}, "two kept things are named 'a'"),
        ([Kept.raw("a", step=1)], {}, "the wanted average sum to 0"),
        ([Kept.raw("a", step=1)], {1: 0.5}, r"the wanted average sum to 0\.5"),
        ([Kept("a", {1: math.nan})], {1: 1.0}, "'a' sum to nan"),
        ([Kept("a", {1: math.inf, 2: -math.inf})], {1: 1.0}, "'a' sum to nan"),
        ([Kept("a", {1: 2.0})], {1: 1.0}, r"'a' sum to 2\.0"),
    ],
)
def test_what_is_no_average_is_refused(kept: list[Kept], wanted: dict[int, float], says: str) -> None:
    """Coefficients that are no average's, two of one name and nothing at all are refused in one line."""
    with pytest.raises(InvalidInputError, match=says):
        plan_rebuild(kept, wanted)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), num_steps=st.integers(1, 12), num_kept=st.integers(1, 8))
def test_whatever_lies_in_the_span_is_rebuilt(data: st.DataObject, num_steps: int, num_kept: int) -> None:
    """Any mixture of what is kept, summing to 1, is found again, with weights no larger than the mixture's."""
    shares = st.lists(st.floats(0.01, 1), min_size=num_steps, max_size=num_steps)
    kept = [
        Kept(str(number), {step: value / math.fsum(drawn) for step, value in enumerate(drawn)})
        for number, drawn in enumerate(data.draw(st.lists(shares, min_size=num_kept, max_size=num_kept)))
    ]
    raw = data.draw(st.lists(st.floats(0.01, 1), min_size=num_kept, max_size=num_kept))
    mixture = [value / math.fsum(raw) for value in raw]
    wanted = {
        step: math.fsum(part * one.coefficients[step] for part, one in zip(mixture, kept, strict=True))
        for step in range(num_steps)
    }

    plan = plan_rebuild(kept, wanted, max_error=1e-9, max_noise_gain=1e6)

    assert math.hypot(*plan.weights.values()) <= math.hypot(*mixture) * (1 + 1e-6)
    assert_honest(plan, kept, wanted)
