"""Windows against their closed forms, and against a training run whose learning rate really decays."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wa_core.averaging.windows import SHAPES, WindowRule, merge_coefficients
from wa_core.errors import InvalidInputError

REGULAR = list(range(20, 420, 20))
IRREGULAR = [3, 4, 9, 40, 41, 100, 137, 500, 501, 777]


@pytest.mark.parametrize("last", [1, 2, 8, 20, 1000])
def test_lawa_is_the_plain_mean_of_the_last_k(last: int) -> None:
    """A uniform window weighs the last k checkpoints alike, or all of them while there are fewer."""
    members = REGULAR[-last:]
    assert WindowRule(last=last).coefficients(REGULAR) == dict.fromkeys(members, 1 / len(members))


@pytest.mark.parametrize(
    ("shape", "decay"),
    [
        ("uniform", lambda x: 1 - x),
        ("linear", lambda x: 1 - x),
        ("minus_sqrt", lambda x: 1 - math.sqrt(x)),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
    ],
)
@pytest.mark.parametrize("last", [1, 2, 7, 20])
def test_at_equal_intervals_a_shape_is_its_decay(shape: str, decay: object, last: int) -> None:
    """With w_i = D(i / K): c_0 = 1 - w_1, c_j = w_j - w_(j+1), c_k = w_k; the mean is linear decay."""
    assert callable(decay)
    w = [decay(i / last) for i in range(1, last)]
    expected = [1 - w[0], *(w[j] - w[j + 1] for j in range(last - 2)), w[-1]] if w else [1.0]

    found = WindowRule(last=last, shape=shape).coefficients(REGULAR)  # type: ignore[arg-type]

    assert list(found) == REGULAR[-last:]
    assert list(found.values()) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_linear_counts_steps_where_uniform_counts_checkpoints() -> None:
    """At irregular steps, linear gives a checkpoint the part of the steps since the one before it."""
    found = WindowRule(last=4, shape="linear").coefficients([1, 100, 110, 140, 190])
    mean_gap = 90 / 3
    assert list(found.values()) == pytest.approx([mean_gap / 120, 10 / 120, 30 / 120, 50 / 120])


@pytest.mark.parametrize("shape", ["linear", "minus_sqrt", "cosine"])
def test_a_merge_is_training_with_a_decayed_rate(shape: str) -> None:
    """Theorem 3.1: the merge is where the same updates, scaled by w_i, would have led to."""
    draw = random.Random(1)
    updates = [draw.gauss(0, 1) for _ in range(19)]
    checkpoints = [0.0]
    for update in updates:
        checkpoints.append(checkpoints[-1] - update)
    decay = {
        "linear": lambda x: 1 - x,
        "minus_sqrt": lambda x: 1 - math.sqrt(x),
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    }[shape]
    decayed = -math.fsum(decay(i / 20) * update for i, update in enumerate(updates, start=1))

    coefficients = WindowRule(last=20, shape=shape).coefficients(REGULAR)  # type: ignore[arg-type]

    merged = math.fsum(c * weights for c, weights in zip(coefficients.values(), checkpoints, strict=True))
    assert merged == pytest.approx(decayed, abs=1e-12)


def test_any_decay_has_its_merge() -> None:
    """merge_coefficients is the theorem; adding the coefficients up again gives the decay."""
    assert merge_coefficients([]) == [1.0]
    assert merge_coefficients([0.0]) == [1.0, 0.0]
    w = [1.0, 0.75, 0.75, 0.125]
    c = merge_coefficients(w)
    assert c == [0.0, 0.25, 0.0, 0.625, 0.125]
    assert [math.fsum(c[i:]) for i in range(1, 5)] == w


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.1], [-0.1], [math.nan], [0.5, math.nan]])
def test_a_rate_that_rises_has_no_merge(weights: list[float]) -> None:
    """A decay that rises or leaves [0, 1] would need negative coefficients, and is refused."""
    with pytest.raises(InvalidInputError, match="must fall from 1 to 0"):
        merge_coefficients(weights)


@pytest.mark.parametrize(
    ("rule", "total_steps", "first"),
    [
        (WindowRule(last_steps=100), None, 320),
        (WindowRule(last_steps=101), None, 300),
        (WindowRule(last_steps=1), None, 400),
        (WindowRule(last_steps=10**9), None, 20),
        (WindowRule(last_steps=100, start_step=350), None, 360),
        (WindowRule(last_fraction=0.25), None, 320),
        (WindowRule(last_fraction=0.25), 400, 320),
        (WindowRule(last_fraction=0.25), 800, 220),
        (WindowRule(last_fraction=1), None, 20),
        (WindowRule(last_fraction=1e-9), None, 400),
        (WindowRule(last=3, start_step=390), None, 400),
    ],
)
def test_a_window_reaches_back_by_steps_or_by_a_part_of_the_run(
    rule: WindowRule, total_steps: int | None, first: int
) -> None:
    """A checkpoint is inside when its step is after the last one's less the length; the last one always is."""
    members = [step for step in REGULAR if step >= first]
    found = rule.coefficients(REGULAR, total_steps=total_steps)
    assert found == dict.fromkeys(members, 1 / len(members))


def test_a_fraction_is_taken_as_it_is_written() -> None:
    """0.7 of 10 steps are 7 checkpoints, whatever 0.7 * 10 is in binary."""
    assert len(WindowRule(last_fraction=0.7).coefficients(range(1, 11))) == 7


def test_no_checkpoint_no_coefficients() -> None:
    """Before the start there is no window, and nothing to weigh."""
    rules = [WindowRule(last=3, start_step=500), WindowRule(last_fraction=0.5, start_step=500, shape="cosine")]
    assert [rule.coefficients(REGULAR) for rule in rules] == [{}, {}]
    assert not rules[0].counts(499)
    assert rules[0].counts(500)


@settings(deadline=None)
@given(
    length=st.one_of(
        st.builds(dict, last=st.integers(1, 40)),
        st.builds(dict, last_steps=st.integers(1, 10**7)),
        st.builds(dict, last_fraction=st.floats(1e-9, 1)),
    ),
    shape=st.sampled_from(SHAPES),
    gaps=st.lists(st.integers(1, 10**6), min_size=1, max_size=30),
)
def test_every_window_is_an_average(length: dict[str, float], shape: str, gaps: list[int]) -> None:
    """Whatever the window, coefficients are at least 0, sum to 1, and end at the last checkpoint."""
    steps = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    found = WindowRule(**length, shape=shape).coefficients(steps)  # type: ignore[arg-type]
    assert list(found) == steps[-len(found) :]
    assert all(value >= 0 for value in found.values())
    assert math.fsum(found.values()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_came_before_the_window_does_not_matter(shape: str) -> None:
    """A window over the files that are still there is the window over all there ever were."""
    rule = WindowRule(last=5, shape=shape)  # type: ignore[arg-type]
    assert rule.coefficients(IRREGULAR) == rule.coefficients(IRREGULAR[-5:])


def test_a_fast_decay_leans_on_old_checkpoints() -> None:
    """minus_sqrt drops fastest at first, so its oldest checkpoint weighs most; cosine weighs the middle most."""
    minus_sqrt = list(WindowRule(last=10, shape="minus_sqrt").coefficients(REGULAR).values())
    cosine = list(WindowRule(last=10, shape="cosine").coefficients(REGULAR).values())
    assert all(before > after for before, after in pairwise(minus_sqrt))
    assert cosine == pytest.approx(cosine[::-1])
    assert max(cosine) == pytest.approx(cosine[4])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"last": 3, "last_steps": 100},
        {"last": 3, "last_fraction": 0.5},
        *({"last": value} for value in (0, -1, 1.5, "8", True, 2**63, 10**400)),
        *({"last_steps": value} for value in (0, -1, 0.2, math.nan)),
        *({"last_fraction": value} for value in (0, -0.1, 1.01, math.nan, math.inf, "0.2", True)),
        *({"last": 3, "shape": value} for value in ("square", "", None)),
        *({"last": 3, "start_step": value} for value in (-1, 1.5, None)),
    ],
)
def test_impossible_windows_are_refused(options: dict[str, object]) -> None:
    """25: windows of no length, of several lengths, or of an unknown shape raise InvalidInputError."""
    with pytest.raises(InvalidInputError) as caught:
        WindowRule(**options)  # type: ignore[arg-type]
    assert len(caught.value.message) < 300


def test_a_run_shorter_than_its_checkpoints_is_refused() -> None:
    """A total of steps that the checkpoints contradict is refused, with both numbers."""
    with pytest.raises(InvalidInputError, match="100 steps but a checkpoint of step 400"):
        WindowRule(last_fraction=0.2).coefficients(REGULAR, total_steps=100)
