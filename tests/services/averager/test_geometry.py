"""Where a landscape's points lie, against the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.averager.geometry import line, plane
from support.landscapes import SIZE, as_weights, point
from wa_core.errors import InvalidInputError

PARAMETERS = ["left.weight", "right.weight"]


@pytest.mark.parametrize("num_points", [3, 4, 15, 31, 201])
def test_a_line_goes_a_quarter_beyond_both_ends(num_points: int) -> None:
    """From -0.25 to 1.25 in equal steps; shares are 1 - t and t."""
    grid = line(num_points)

    assert (len(grid.x), grid.x[0], grid.x[-1], grid.y) == (num_points, -0.25, 1.25, (0.0,))
    assert np.allclose(np.diff(grid.x), 1.5 / (num_points - 1))
    assert grid.places == ((0.0, 0.0), (1.0, 0.0))
    assert grid.rows == (tuple((1.0 - t, t) for t in grid.x),)


def test_the_default_line_meets_its_weights_exactly() -> None:
    """With 31 points, raw is one of them and the average another: to the last bit."""
    assert {(1.0, 0.0), (0.0, 1.0)} <= set(line(31).rows[0])


@given(st.integers(0, 1000), st.integers(3, 9))
def test_a_plane_has_the_basis_of_gram_and_schmidt(seed: int, num_points: int) -> None:
    """Every point is w1 + x u/|u| + y v/|v|, as brute force has it, and the weights are at their coordinates."""
    first, second, third = (point(3 * seed + number) for number in range(3))
    grid = plane([as_weights(one) for one in (first, second, third)], PARAMETERS, num_points)

    u = second - first
    v = (third - first) - ((third - first) @ u) / (u @ u) * u
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    assert (len(grid.x), len(grid.y), len(grid.rows)) == (num_points,) * 3
    for (x, y), weights in zip(grid.places, (first, second, third), strict=True):
        assert np.allclose(first + x * u + y * v, weights, atol=1e-6)
    for y, row in zip(grid.y, grid.rows, strict=True):
        for x, shares in zip(grid.x, row, strict=True):
            assert math.isclose(sum(shares), 1.0, abs_tol=1e-9)
            mixed = sum(share * one for share, one in zip(shares, (first, second, third), strict=True))
            assert np.allclose(mixed, first + x * u + y * v, atol=1e-5)


def test_a_plane_goes_beyond_its_weights() -> None:
    """On each side by a quarter of what there is between the outermost of them."""
    grid = plane([as_weights(point(seed)) for seed in range(3)], PARAMETERS, 5)

    for axis, side in ((grid.x, 0), (grid.y, 1)):
        low, high = min(place[side] for place in grid.places), max(place[side] for place in grid.places)
        assert axis[0] == pytest.approx(low - (high - low) / 4)
        assert axis[-1] == pytest.approx(high + (high - low) / 4)


@pytest.mark.parametrize("share", [0.5, 0.0, 1.0, -3.0])
def test_weights_on_one_line_span_no_plane(share: float) -> None:
    """The mean of two checkpoints is between them; a plane through all three is anybody's."""
    first, second = point(1), point(2)
    third = share * first + (1 - share) * second

    with pytest.raises(InvalidInputError, match="on one line") as caught:
        plane([as_weights(one) for one in (first, second, third)], PARAMETERS, 5)

    assert caught.value.code == "points_on_a_line"


def test_equal_weights_span_no_plane() -> None:
    """Nor do three times the same weights, or two."""
    one, other = as_weights(np.ones(SIZE)), as_weights(point(1))
    for weights in ([one, one, one], [one, one, other], [one, other, one]):
        with pytest.raises(InvalidInputError, match="on one line"):
            plane(weights, PARAMETERS, 5)


def test_weights_that_diverged_span_no_plane() -> None:
    """NaN has no distance."""
    weights = [as_weights(point(1)), as_weights([math.nan] * SIZE), as_weights(point(2))]

    with pytest.raises(InvalidInputError) as caught:
        plane(weights, PARAMETERS, 5)

    assert caught.value.code == "not_finite"
