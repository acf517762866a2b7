"""Numbers per layer as lengths of bars: how far an average is from the last iterate, how BatchNorm moved. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: A model may have thousands of layers; a page shows those that differ most.
MAX_BARS = 64


@dataclass(frozen=True, slots=True)
class Bar:
    """One layer: its numbers, and the length of its bar as a part of 100."""

    name: str
    value: float
    length: float
    numbers: Mapping[str, Any]


def bars(layers: Sequence[Mapping[str, Any]], *, by: str) -> list[Bar]:
    """The layers with the largest `by`, in the model's order, with lengths relative to the largest of them."""
    found = [layer for layer in layers if layer.get(by) is not None]
    largest = sorted(found, key=lambda layer: -abs(layer[by]))[:MAX_BARS]
    longest = max((abs(layer[by]) for layer in largest), default=0.0) or 1.0
    shown = {layer["name"] for layer in largest}
    return [
        Bar(layer["name"], layer[by], round(100 * abs(layer[by]) / longest, 2), layer)
        for layer in found
        if layer["name"] in shown
    ]


def ratio_bars(layers: Sequence[Mapping[str, Any]], *, by: str) -> list[Bar]:
    """The same for ratios, whose distance from 1 counts, alike for twice as much and half as much."""
    distances = [
        {**layer, "distance": abs(math.log(layer[by]))} for layer in layers if (layer.get(by) or 0.0) > 0.0
    ]
    return bars(distances, by="distance")
