"""Measures weights with a recipe: held-out metrics, values to compare by, recalibrated BatchNorm buffers.

It runs user code in this process and knows no other process, no file and no bucket. The invariant: what is
measured depends on the recipe and the weights alone, not on what was measured before.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from services.averager.layers import measure_drift
from wa_core.batchnorm import recalibrate
from wa_core.calibration import count_samples
from wa_core.comparison import compare
from wa_core.errors import InvalidInputError
from wa_core.records import HEADLINE_METRIC, BatchNormSummary

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray
    from torch import nn

    from wa_core.batchnorm import BatchNormReport
    from wa_core.recipe import Recipe
    from wa_core.records import Comparison

    Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measured:
    """Held-out metrics of one set of weights, and the headline metric's values that they are compared by.

    `values` has shape (n,): one for each sample, or for each batch, with the batches' sizes in `weights`.
    """

    metrics: dict[str, float]
    values: Floats
    weights: Floats | None = None

    @property
    def unit(self) -> Literal["sample", "batch"]:
        """What one value stands for."""
        return "sample" if self.weights is None else "batch"


@dataclass(frozen=True, slots=True)
class Trial:
    """One average, measured before and after recalibration; `buffers` are those that recalibration has changed."""

    before: dict[str, float]
    after: Measured | None
    batchnorm: BatchNormSummary
    buffers: dict[str, Tensor] = field(default_factory=dict)


def measure(recipe: Recipe, model: nn.Module) -> Measured:
    """Held-out metrics of `model` as it is.

    Raises:
        InvalidInputError: what the recipe returned is no measurement.
    """
    each = recipe.evaluate_each(model, recipe.heldout_batches())
    if each is None:
        return _measure_batches(recipe, model)
    return measured_of(each)


def measured_of(each: Mapping[str, Tensor]) -> Measured:
    """What samples' values amount to.

    Args:
        each: by metric, one value per sample, shape (n,).

    Raises:
        InvalidInputError: they are no such values, or the headline metric is not among them.
    """
    values = {name: _checked(name, tensor) for name, tensor in each.items()}
    if HEADLINE_METRIC not in values:
        raise InvalidInputError(
            f"the recipe's evaluate_each gave {', '.join(values) or 'nothing'}; it must give {HEADLINE_METRIC!r}"
        )
    return Measured({name: float(found.mean()) for name, found in values.items()}, values[HEADLINE_METRIC].numpy())


def measure_weights(recipe: Recipe, model: nn.Module, weights: Mapping[str, Tensor]) -> Measured:
    """Held-out metrics of `weights`."""
    model.load_state_dict(dict(weights), strict=True)
    return measure(recipe, model)


def try_average(recipe: Recipe, model: nn.Module, weights: Mapping[str, Tensor]) -> Trial:
    """Measure an average before and after recalibration.

    Calibration data that will not do is an answer, not an error: the average keeps the statistics it came with.
    """
    model.load_state_dict(dict(weights), strict=True)
    before = recipe.evaluate(model, recipe.heldout_batches())
    try:
        report = recalibrate(model, recipe.calibration_batches(), forward=recipe.forward)
    except InvalidInputError as error:
        return Trial(before, None, BatchNormSummary(status="failed", code=error.code, message=error.message))
    summary = summary_of(report, model, before=weights)
    return Trial(before, measure(recipe, model), summary, changed_buffers(model, weights))


def summary_of(report: BatchNormReport, model: nn.Module, *, before: Mapping[str, Tensor]) -> BatchNormSummary:
    """What a recalibration that went well did, for the record: to `model`, which had the buffers in `before`."""
    return BatchNormSummary(
        status="skipped" if report.skipped else "recalibrated",
        num_layers=report.num_layers,
        num_batches=report.num_batches,
        num_samples=report.num_samples,
        message="the model has no BatchNorm layers" if report.skipped else "",
        layers=measure_drift(model, before),
    )


def changed_buffers(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the buffers that recalibration has changed; the model goes on to the next average."""
    # Buffers that are not persistent are in no checkpoint.
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in weights}
    return {name: buffer.clone() for name, buffer in buffers.items() if not torch.equal(buffer, weights[name])}


def compare_measured(averaged: Measured | None, raw: Measured | None) -> Comparison | None:
    """Averaged against raw, or None where there is nothing to compare."""
    if averaged is None or raw is None:
        return None
    return compare(
        averaged.values, raw.values, metric=HEADLINE_METRIC, weights=averaged.weights, unit=averaged.unit
    )


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics without the numbers that are not finite: weights that have diverged give such."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def data_digest(recipe: Recipe) -> str:
    """SHA-256, in hex, over the held-out and the calibration batches: dtypes, shapes and values of all tensors."""
    digest = hashlib.sha256()
    for label, batches in (("heldout", recipe.heldout_batches()), ("calibration", recipe.calibration_batches())):
        digest.update(label.encode())
        for batch in batches:
            for part in _parts(batch):
                digest.update(part)
    return digest.hexdigest()


def _parts(batch: Any) -> Iterator[bytes | memoryview]:  # noqa: ANN401  whatever a data loader yields
    if isinstance(batch, Tensor | np.ndarray):
        values = torch.as_tensor(batch).detach().cpu().contiguous()
        yield f"{values.dtype}{tuple(values.shape)}".encode()
        yield values.reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield repr(key).encode()
            yield from _parts(value)
    elif isinstance(batch, tuple | list):
        yield f"{len(batch)}[".encode()
        for value in batch:
            yield from _parts(value)
    else:
        # Other objects may show an address; their type is what can be told apart.
        is_plain = isinstance(batch, str | bytes | int | float | None)
        yield (repr(batch) if is_plain else type(batch).__qualname__).encode()


def _measure_batches(recipe: Recipe, model: nn.Module) -> Measured:
    metrics = recipe.evaluate(model, recipe.heldout_batches())
    batches: Iterable[Any] = recipe.heldout_batches()
    pairs = [(recipe.evaluate(model, [batch])[HEADLINE_METRIC], count_samples(batch) or 1) for batch in batches]
    values, weights = np.asarray(pairs, np.float64).reshape(-1, 2).T
    return Measured(dict(metrics), values, weights)


def _checked(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim != 1 or len(tensor) == 0:
        raise InvalidInputError(
            f"the recipe's evaluate_each gave {name!r} of shape {tuple(tensor.shape)}, not one value per sample"
        )
    return tensor.detach().cpu().double()
