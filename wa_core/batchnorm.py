"""BatchNorm statistics for weights that no training step ever ran with.

Averaged weights need running means and variances of their own. `recalibrate` computes them exactly: per layer, the
population mean and variance of the layer's inputs over the calibration data, in float64, merged batch by batch
with Chan's formula, so that neither batch size nor order nor a large mean matters. Shards of the data are done
apart with `collect_moments`, then `merge_moments` and `apply_moments`. It knows torch modules and nothing of runs
or recipes. The invariant: whatever happens, everything but the layers' statistics is as it was before, and after
an error these are, too.

Which layers: every torch BatchNorm (1d, 2d, 3d, synchronised, and lazy ones once they have run) and every
InstanceNorm, provided that they keep running statistics. InstanceNorm normalises each instance by itself in
training, so its statistics become the means over instances of the instances' own mean and population variance,
each instance counting once; torch tracks the same with a momentum, and `update_bn` does not touch them.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from wa_core.calibration import CalibrationLoop
from wa_core.errors import EmptyCalibrationError, InvalidInputError
from wa_core.moments import InstanceMoments, Moments, check_moments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from wa_core.calibration import Forward, Seen

Method = Literal["exact", "update_bn"]
_CODE = "calibration_failed"
# Fewer batches say too little about their own spread to stop on it.
_MIN_BATCHES = 8


@dataclass(frozen=True, slots=True)
class BatchNormReport:
    """What a recalibration did.

    Attributes:
        method: how the statistics were computed.
        num_layers: normalisation layers that got new statistics.
        num_batches: calibration batches that ran; of the first pass, when there were several.
        num_samples: samples in them (the length of the first tensor of each batch).
        layers_skipped: names of layers that never ran, and so kept their statistics.
        skipped: True when the model has no such layer with statistics, so that no data was read.
        is_stopped_early: True when `tolerance` was reached before the data ended.
    """

    method: Method
    num_layers: int = 0
    num_batches: int = 0
    num_samples: int = 0
    layers_skipped: tuple[str, ...] = ()
    skipped: bool = False
    is_stopped_early: bool = False


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    method: Method = "exact",
    tolerance: float | None = None,
    sequential: bool = False,
) -> BatchNormReport:
    """Recompute every BatchNorm layer's statistics for the model's current weights.

    While it runs, each layer normalises with the statistics of the batch at hand, as in training, so deeper layers
    see the inputs they saw there. ``num_batches_tracked`` becomes the number of batches the layer saw.

    Args:
        model: a model on the device where it shall run; only the normalisation layers' buffers change.
        batches: inputs of shape (N, …); tuples and lists count by their first element, dicts as keyword arguments.
        forward: called as ``forward(model, batch)`` instead, for models that take something else.
        device: where to move each batch first; None leaves it where it is.
        method: ``exact`` computes population statistics over all data, with all modules in evaluation mode.
            ``update_bn`` reproduces `torch.optim.swa_utils.update_bn`: the mean over batches of each batch's
            unbiased variance, with the whole model in training mode. In both, layers that never ran keep their
            statistics.
        tolerance: stop once the standard error of every channel's mean (in units of its standard deviation) and of
            its variance (relative) is at most this, as estimated from the batches' own spread, after 8 batches at
            least. Only shuffled data have an honest spread. None reads all data.
        sequential: after the first pass, fix the first layer's statistics and go through the data again for the
            next one, and so on in the order in which they run: each layer's statistics are then those of the
            inputs it has in evaluation mode. One pass per layer; `batches` must be re-iterable.

    Returns:
        What was done; `skipped` when the model has no BatchNorm.

    Raises:
        EmptyCalibrationError: `batches` yielded nothing; the model is unchanged.
        InvalidInputError: a layer saw a single value per channel, or NaN or infinity, or an option is impossible;
            the model is unchanged.

    Source: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3; Izmailov et al. 2018, section 3.2.
    """
    _check_options(batches, method=method, tolerance=tolerance, sequential=sequential)
    layers = _find_layers(model, kind=_NormBase if method == "exact" else _BatchNorm)
    if not layers:
        return BatchNormReport(method, skipped=True)
    loop = CalibrationLoop(model, batches, forward, device)
    found, seen = (
        _collect(layers, loop, tolerance=tolerance, sequential=sequential)
        if method == "exact"
        else _average(layers, loop)
    )
    if seen.num_batches == 0:
        raise _no_batch()
    _apply(layers, found)
    idle = tuple(name for name in layers if name not in found)
    return BatchNormReport(
        method,
        num_layers=len(found),
        num_batches=seen.num_batches,
        num_samples=seen.num_samples,
        layers_skipped=idle,
        is_stopped_early=not seen.is_complete,
    )


def collect_moments(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Moments]:
    """One shard's part of a recalibration: the moments of each layer's inputs, by the layer's name.

    The model is unchanged. An empty shard gives no moments. Batches are normalised by themselves, so it does not
    matter which shard a batch is in.

    Args:
        model: as for `recalibrate`.
        batches: as for `recalibrate`.
        forward: as for `recalibrate`.
        device: as for `recalibrate`.
    """
    layers = _find_layers(model, kind=_NormBase)
    loop = CalibrationLoop(model, batches, forward, device)
    return _collect(layers, loop, tolerance=None, sequential=False)[0] if layers else {}


def merge_moments(shards: Iterable[Mapping[str, Moments]]) -> dict[str, Moments]:
    """The moments of all shards together; in a fixed order of shards, the same bits every time."""
    merged: dict[str, Moments] = {}
    for shard in shards:
        for name, moments in shard.items():
            merged[name] = merged[name].merge(moments) if name in merged else moments
    return merged


def apply_moments(model: nn.Module, moments: Mapping[str, Moments]) -> None:
    """Give the layers the statistics that `moments` describe; layers it does not name keep theirs.

    Raises:
        EmptyCalibrationError: there are none, though the model has layers that need them.
        InvalidInputError: a name or a number of channels is not the model's, or the moments are of a single value
            or not finite. The model is unchanged.
    """
    layers = _find_layers(model, kind=_NormBase)
    if layers and not moments:
        raise _no_batch()
    for name, found in moments.items():
        if name not in layers or layers[name].num_features != len(found.mean):
            raise InvalidInputError(
                f"there are moments of {len(found.mean)} channels for {name!r}, which is no such layer of this "
                f"model; collect them from the same architecture",
                code=_CODE,
            )
    _apply(layers, moments)


class _Observer:
    """Takes the moments of a layer's inputs, by a hook before each call, and lets it normalise with the batch."""

    def __init__(self, layer: _NormBase, *, tolerance: float | None) -> None:
        self.layer = layer
        self.moments: Moments | None = None
        self._tolerance = tolerance
        self._spread: Moments | None = None
        self._is_settled = False
        self._given = [_copied(layer.running_mean), _copied(layer.running_var)]

    def hook(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook."""
        if not self._is_settled:
            self.observe(args[0] if args else kwargs["input"])

    def observe(self, inputs: Tensor) -> None:
        """Merge the moments, and choose what this call normalises with."""
        if isinstance(self.layer, _InstanceNorm):
            is_unbatched = inputs.ndim == self.layer._get_no_batch_dim()  # type: ignore[no-untyped-call] # noqa: SLF001
            batch: Moments = InstanceMoments.of(inputs.unsqueeze(0) if is_unbatched else inputs)
            self.layer.training = True
        else:
            batch = Moments.of(inputs)
            self._normalise_by(batch)
        self.moments = self.moments.merge(batch) if self.moments else batch
        if self._tolerance is not None and batch.n:
            sample = Moments(1, torch.cat([batch.mean, batch.variance]), batch.mean.new_zeros(2 * len(batch.mean)))
            self._spread = self._spread.merge(sample) if self._spread else sample

    def _normalise_by(self, batch: Moments) -> None:
        # Evaluation mode with the batch's statistics computes what training mode does without finding them a
        # second time, which saves more than the exact moments cost; and SyncBatchNorm would refuse CPUs, or wait
        # for other ranks, in training mode (ADR 56). One value per channel cannot be normalised by itself,
        # so that one is normalised with the statistics given.
        is_enough = batch.n > 1
        _copy(self.layer.running_mean, batch.mean if is_enough else self._given[0])
        _copy(self.layer.running_var, batch.variance if is_enough else self._given[1])

    def is_precise(self) -> bool:
        """Whether the statistics' standard errors are within the tolerance."""
        spread, found = self._spread, self.moments
        if self._tolerance is None or spread is None or found is None or spread.n < _MIN_BATCHES:
            return False
        errors = (spread.variance / (spread.n - 1)).sqrt()
        on_mean, on_variance = errors.chunk(2)
        limit = self._tolerance * found.variance
        return bool((on_mean <= self._tolerance * found.variance.sqrt()).all() & (on_variance <= limit).all())

    def settle(self, name: str) -> None:
        """From now on normalise as in evaluation, with the statistics found."""
        assert self.moments is not None  # noqa: S101 - only layers that ran are settled
        check_moments(name, self.moments)
        _write(self.layer, self.moments)
        self.layer.training = False
        self._is_settled = True

    def restart(self) -> None:
        """Forget what was seen."""
        self.moments = self._spread = None


def _collect(
    layers: Mapping[str, _NormBase], loop: CalibrationLoop, *, tolerance: float | None, sequential: bool
) -> tuple[dict[str, Moments], Seen]:
    observers = {name: _Observer(layer, tolerance=tolerance) for name, layer in layers.items()}
    order: dict[str, None] = {}
    with _restored(loop.model) as undo, torch.no_grad():
        # The flags alone: an overridden eval() may do more, and could not be undone.
        for module in loop.model.modules():
            module.training = False
        for name, observer in observers.items():
            observer.layer.momentum = 0.0  # InstanceNorm runs in training mode, and must not add to its statistics
            undo(observer.layer.register_forward_pre_hook(observer.hook, with_kwargs=True).remove)
            undo(observer.layer.register_forward_pre_hook(lambda *_, n=name: order.setdefault(n)).remove)
        seen = loop.run(is_enough=lambda: all(observers[name].is_precise() for name in order))
        for before, name in pairwise(order if sequential else ()):
            observers[before].settle(before)
            observers[name].restart()
            loop.run(is_enough=observers[name].is_precise)
    return {name: found for name in order if (found := observers[name].moments) is not None}, seen


def _average(layers: Mapping[str, _NormBase], loop: CalibrationLoop) -> tuple[dict[str, Moments], Seen]:
    """What `torch.optim.swa_utils.update_bn` computes, by the layers' own cumulative average over batches."""
    calls = dict.fromkeys(layers, 0)
    found: dict[str, Moments] = {}
    with _restored(loop.model) as undo, torch.no_grad():
        loop.model.train()
        for name, layer in layers.items():
            layer.reset_running_stats()
            layer.momentum = None
            undo(layer.register_forward_pre_hook(_refuse_single(name, calls), with_kwargs=True).remove)
        seen = loop.run(is_enough=lambda: False)
        for name, layer in layers.items():
            mean, variance = layer.running_mean, layer.running_var
            if calls[name] and mean is not None and variance is not None:
                # As moments of many values: the variance is given, and none needs to be refused.
                found[name] = Moments(2, mean.clone(), 2 * variance, num_batches=calls[name])
    return found, seen


def _refuse_single(name: str, calls: dict[str, int]) -> Callable[..., None]:
    """A forward pre-hook that counts calls and refuses what torch would refuse, in clearer words."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs["input"]
        if inputs.numel() <= inputs.shape[1]:
            n = inputs.numel() // max(inputs.shape[1], 1)
            raise InvalidInputError(
                f"BatchNorm layer {name!r} got a batch of {n} value(s) per channel, and update_bn needs at least "
                f"2 in each; the model is unchanged. Drop the short last batch or use method='exact'",
                code=_CODE,
            )
        calls[name] += 1

    return hook


def _check_options(batches: Iterable[Any], *, method: Method, tolerance: float | None, sequential: bool) -> None:
    if method not in ("exact", "update_bn"):
        raise InvalidInputError(f"method is {method!r}; it must be 'exact' or 'update_bn'")
    if method == "update_bn" and (tolerance is not None or sequential):
        raise InvalidInputError(
            "tolerance and sequential belong to method='exact'; update_bn always reads all once"
        )
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance > 0):
        raise InvalidInputError(f"tolerance is {tolerance}; it must be above 0, such as 0.01, or None")
    if sequential and iter(batches) is batches:
        raise InvalidInputError(
            "a sequential pass goes through the data once per layer, but `batches` can be read only once; pass a "
            "list or a DataLoader instead of an iterator"
        )


def _find_layers(model: nn.Module, *, kind: type[nn.Module]) -> dict[str, _NormBase]:
    layers: dict[str, _NormBase] = {}
    for name, module in model.named_modules():
        if not isinstance(module, kind) or not isinstance(module, _BatchNorm | _InstanceNorm):
            continue
        if any(
            nn.parameter.is_lazy(tensor) for tensor in (module.running_mean, module.weight) if tensor is not None
        ):
            raise InvalidInputError(
                f"BatchNorm layer {name!r} is lazy and has never run, so it has no statistics yet; run the model "
                f"once before it is recalibrated",
                code=_CODE,
            )
        if module.track_running_stats and module.running_mean is not None and module.running_var is not None:
            layers[name] = module
    return layers


@contextmanager
def _restored(model: nn.Module) -> Iterator[Callable[..., object]]:
    """Undo everything on the way out: training flags, momentum, buffers, torch's random state.

    Yields how to register more.
    """
    tensors = (*model.parameters(), *model.buffers())
    gpus = {tensor.device.index for tensor in tensors if tensor.device.type == "cuda"}
    with ExitStack() as undo:
        # A shuffling loader and dropout draw numbers, and training must not go on differently for that.
        undo.enter_context(torch.random.fork_rng(devices=sorted(gpus)))
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
            if isinstance(module, _BatchNorm | _InstanceNorm):
                undo.callback(setattr, module, "momentum", module.momentum)
            for name, buffer in module.named_buffers(recurse=False):
                undo.callback(_restore, module, name, buffer, buffer.detach().clone())
        yield undo.callback


def _restore(module: nn.Module, name: str, buffer: Tensor, values: Tensor) -> None:
    _copy(buffer, values)
    # Code that assigned a new tensor instead of changing the old one is undone as well.
    setattr(module, name, buffer)


def _apply(layers: Mapping[str, _NormBase], found: Mapping[str, Moments]) -> None:
    for name, moments in found.items():
        check_moments(name, moments)
    for name, moments in found.items():
        _write(layers[name], moments)


def _no_batch() -> EmptyCalibrationError:
    return EmptyCalibrationError(
        "the calibration data yielded no batch, so BatchNorm statistics cannot be computed; the model is "
        "unchanged. Pass a re-iterable data set (an exhausted iterator is empty) with at least one batch"
    )


def _write(layer: _NormBase, moments: Moments) -> None:
    _copy(layer.running_mean, moments.mean)
    _copy(layer.running_var, moments.variance)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(moments.num_batches)


@torch.no_grad()
def _copy(into: Tensor | None, values: Tensor | None) -> None:
    if into is not None and values is not None:
        into.copy_(values)


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()
