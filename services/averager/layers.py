"""What averaging and recalibration did, layer by layer: distances from raw weights, drift of BatchNorm statistics.

It knows torch modules and tensors; no recipe, no file and no bucket. The invariant: what is returned is bounded
(`MAX_LAYERS`), finite, and of the same tensors the same; memory is bounded by a block, however large a tensor is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch.nn.modules.batchnorm import _NormBase

from wa_core.records import MAX_LAYER_CHARS, MAX_LAYERS, BatchNormDrift, LayerDistance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    Sums = tuple[float, ...]

#: The path of what is in no module but the model itself.
ROOT = "(model)"
_BLOCK = 1 << 20


def measure_distances(
    model: nn.Module, averaged: Mapping[str, Tensor], raw: Mapping[str, Tensor]
) -> list[LayerDistance]:
    """The L2 distance between averaged and raw parameters, for each module with parameters of its own.

    Tied parameters count once, where they are first. Sums are in float64. Of more than `MAX_LAYERS` modules those
    under one path are told together; those with values that are not finite are left out.

    Args:
        model: says which tensors are parameters, and in which modules.
        averaged: the average, by name.
        raw: the raw weights, by name.
    """
    sums: defaultdict[str, Sums] = defaultdict(lambda: (0.0, 0.0, 0.0))
    for name, _ in model.named_parameters():
        if name in averaged and name in raw and averaged[name].shape == raw[name].shape:
            path = name.rpartition(".")[0]
            sums[path] = _plus(sums[path], _squares(averaged[name], raw[name]))
    return [
        LayerDistance(
            name=path,
            distance=math.sqrt(apart),
            relative=math.sqrt(apart / norm) if norm else None,
            size=int(size),
        )
        for path, (apart, norm, size) in _grouped(sums).items()
        if math.isfinite(apart) and math.isfinite(norm)
    ]


def measure_drift(model: nn.Module, before: Mapping[str, Tensor]) -> list[BatchNormDrift]:
    """How far each layer's statistics were, before recalibration, from those that it has now.

    Args:
        model: with the new statistics.
        before: the buffers with the old ones, by name.
    """
    sums: dict[str, Sums] = {}
    for path, layer in model.named_modules():
        mean, variance = (f"{path}.{name}".lstrip(".") for name in ("running_mean", "running_var"))
        if isinstance(layer, _NormBase) and layer.running_mean is not None and mean in before:
            sums[path] = _drift(layer, before[mean].double(), before[variance].double())
    return [
        BatchNormDrift(
            name=path,
            mean_shift=math.sqrt(shifts / num_channels),
            variance_ratio=math.exp(ratios / num_ratios) if num_ratios else None,
        )
        for path, (shifts, num_channels, ratios, num_ratios) in _grouped(sums).items()
        if math.isfinite(shifts) and math.isfinite(ratios)
    ]


def _drift(layer: _NormBase, mean: Tensor, variance: Tensor) -> Sums:
    """Sum of squared shifts and of logarithms of ratios over channels, with how many there are of each."""
    assert layer.running_mean is not None  # noqa: S101  the caller has looked
    assert layer.running_var is not None  # noqa: S101  a layer has both or none
    new_mean, new_variance = layer.running_mean.double(), layer.running_var.double()
    shifts = (new_mean - mean).square() / (new_variance + layer.eps)
    has_both = (new_variance > 0) & (variance > 0)
    ratios = (new_variance[has_both] / variance[has_both]).log()
    return float(shifts.sum()), float(len(shifts)), float(ratios.sum()), float(len(ratios))


def _squares(averaged: Tensor, raw: Tensor) -> Sums:
    """Sum of squared differences, sum of squares of the raw values, and how many there are."""
    apart = norm = 0.0
    one, other = _real(averaged), _real(raw)
    for begin in range(0, len(other), _BLOCK):
        there = other[begin : begin + _BLOCK].double()
        apart += float((one[begin : begin + _BLOCK].double() - there).square().sum())
        norm += float(there.square().sum())
    return apart, norm, float(averaged.numel())


def _real(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def _grouped(sums: Mapping[str, Sums]) -> dict[str, Sums]:
    """Under paths short enough that there are no more than `MAX_LAYERS` of them."""
    depth = max((path.count(".") + 1 for path in sums), default=0)
    while len({_short(path, depth) for path in sums}) > MAX_LAYERS:
        depth -= 1
    found: dict[str, Sums] = {}
    for path, part in sums.items():
        group = _short(path, depth)
        found[group] = _plus(found[group], part) if group in found else part
    return found


def _short(path: str, depth: int) -> str:
    return ".".join(path.split(".")[:depth])[:MAX_LAYER_CHARS] or ROOT


def _plus(one: Sums, other: Sums) -> Sums:
    return tuple(a + b for a, b in zip(one, other, strict=True))
