"""Where a landscape's points lie: mixtures of given weights, along a line or over a plane.

It knows tensors and coordinates; no model, no loss. The invariant: every point is a mixture of the given weights
whose shares sum to 1, and at the given weights themselves it is those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from torch import Tensor

    Weights = Mapping[str, Tensor]
    Shares = tuple[float, ...]

#: How far beyond the outermost weights a line or a plane goes, as a part of the way between them.
MARGIN = 0.25
_BLOCK = 1 << 20
_FLAT = 1e-6  # float32 weights this near to a line are on it


@dataclass(frozen=True, slots=True)
class Grid:
    """The points of a landscape.

    Attributes:
        x: coordinates along the first axis, ascending.
        y: those along the second; one 0 of a line.
        places: the coordinates of the given weights, in their order.
        rows: for each `y` the shares of the given weights at each `x`.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    places: tuple[tuple[float, float], ...]
    rows: tuple[tuple[Shares, ...], ...]


def line(num_points: int) -> Grid:
    """From the first weights (0) to the second (1), and a quarter of the way beyond both."""
    x = _axis(0.0, 1.0, num_points)
    return Grid(x, (0.0,), ((0.0, 0.0), (1.0, 0.0)), (tuple((1.0 - t, t) for t in x),))


def plane(weights: Sequence[Weights], parameters: Collection[str], num_points: int) -> Grid:
    """The plane through three weights, with `num_points` to a side.

    Coordinates are distances from the first weights, in the basis of Gram and Schmidt: with ``u = w2 - w1`` and
    ``v = (w3 - w1) - <w3 - w1, u> / |u|^2 u`` a point is ``w1 + x u / |u| + y v / |v|``.

    Args:
        weights: of one model, by name.
        parameters: the names of those tensors that distances are told by.
        num_points: at least 2.

    Raises:
        InvalidInputError: they are on one line (`points_on_a_line`).

    Source: Garipov et al. 2018, "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", appendix A.
    """
    uu, uw, ww = _products(weights, parameters)
    lean = uw / uu if uu else 0.0
    length, height = math.sqrt(uu), math.sqrt(_height_squared(weights, parameters, lean))
    if height <= _FLAT * math.sqrt(max(uu, ww)) or not length:
        raise InvalidInputError(
            "the oldest kept checkpoint in the average, the newest raw weights and the average are on one line, "
            "as those of two checkpoints always are; wait until more are in it, or ask for the line",
            code="points_on_a_line",
        )
    if not math.isfinite(length + height):
        raise InvalidInputError("the weights hold values that are not finite", code="not_finite")
    places = ((0.0, 0.0), (length, 0.0), (lean * length, height))
    x = _axis(*_ends([place[0] for place in places]), num_points)
    y = _axis(*_ends([place[1] for place in places]), num_points)

    def shares(at_x: float, at_y: float) -> Shares:
        third = at_y / height
        second = at_x / length - lean * third
        return (1.0 - second - third, second, third)

    return Grid(x, y, places, tuple(tuple(shares(at_x, at_y) for at_x in x) for at_y in y))


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _axis(low: float, high: float, num_points: int) -> tuple[float, ...]:
    margin = MARGIN * (high - low)
    step = (high - low + 2 * margin) / (num_points - 1)
    # Whole multiples of the step, rounded: 0 and 1 are then hit and not just missed.
    digits = 12 - math.floor(math.log10(max(abs(low), abs(high))))
    return tuple(round(float(low - margin + number * step), digits) for number in range(num_points))


def _products(weights: Sequence[Weights], parameters: Collection[str]) -> tuple[float, float, float]:
    """``<u, u>``, ``<u, w>`` and ``<w, w>`` of ``u = w2 - w1`` and ``w = w3 - w1``, in float64."""
    total = np.zeros(3)
    for first, second, third in _blocks(weights, parameters):
        u, w = second - first, third - first
        total += [float(u @ u), float(u @ w), float(w @ w)]
    return float(total[0]), float(total[1]), float(total[2])


def _height_squared(weights: Sequence[Weights], parameters: Collection[str], lean: float) -> float:
    # Not from the products: their difference would have lost what little there is of a flat plane.
    rest = ((third - first) - lean * (second - first) for first, second, third in _blocks(weights, parameters))
    return sum(float(part @ part) for part in rest)


def _blocks(weights: Sequence[Weights], parameters: Collection[str]) -> Iterator[list[Tensor]]:
    for name in parameters:
        parts = [one[name].reshape(-1) for one in weights]
        for begin in range(0, len(parts[0]), _BLOCK):
            yield [part[begin : begin + _BLOCK].double() for part in parts]
