"""Numbers per layer as lengths of bars: how far an average is from the last iterate, how BatchNorm moved. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wa_core.records import BatchNormDrift, LayerDistance

#: A model may have hundreds of layers; a page shows those that differ most.
MAX_BARS = 64


@dataclass(frozen=True, slots=True)
class DistanceBar:
    """A layer's distance, and the length of its bar as a part of 100."""

    layer: LayerDistance
    length: float


@dataclass(frozen=True, slots=True)
class DriftBar:
    """A BatchNorm layer's drift, and the lengths of its bars: of the mean, and of the variance to either side."""

    layer: BatchNormDrift
    mean_length: float
    variance_length: float


def distance_bars(layers: Sequence[LayerDistance]) -> list[DistanceBar]:
    """The layers that are relatively farthest, in the model's order."""
    farthest = sorted(layers, key=lambda layer: -(layer.relative or 0.0))[:MAX_BARS]
    longest = max((layer.relative or 0.0 for layer in farthest), default=0.0)
    shown = {layer.name for layer in farthest}
    return [DistanceBar(layer, _part(layer.relative or 0.0, longest)) for layer in layers if layer.name in shown]


def drift_bars(layers: Sequence[BatchNormDrift]) -> list[DriftBar]:
    """The layers whose means moved most, in the model's order.

    Twice the variance makes as long a bar as half of it.
    """
    moved = sorted(layers, key=lambda layer: -layer.mean_shift)[:MAX_BARS]
    longest_mean = max((layer.mean_shift for layer in moved), default=0.0)
    longest_variance = max((abs(math.log(layer.variance_ratio or 1.0)) for layer in moved), default=0.0)
    shown = {layer.name for layer in moved}
    return [
        DriftBar(
            layer,
            _part(layer.mean_shift, longest_mean),
            _part(abs(math.log(layer.variance_ratio or 1.0)), longest_variance),
        )
        for layer in layers
        if layer.name in shown
    ]


def _part(value: float, of: float) -> float:
    return round(100 * value / of, 2) if of > 0 else 0.0
