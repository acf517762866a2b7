"""BatchNorm statistics for weights that no training step ever ran with.

Averaged weights need running means and variances of their own. `recalibrate` computes them exactly: per layer, the
population mean and variance of the layer's inputs over the calibration data, in float64, merged batch by batch
with Chan's formula, so that neither batch size nor order nor a large mean matters. It knows torch modules and
nothing of runs or recipes. The invariant: whatever happens, everything but the layers' statistics is as it was
before, and after an error these are, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wa_core.errors import EmptyCalibrationError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Forward = Callable[[nn.Module, Any], object]

Method = Literal["exact", "update_bn"]
_CODE = "calibration_failed"


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of a layer's inputs: what shards compute apart and then merge.

    Attributes:
        n: values per channel.
        mean: float64, shape (channels,).
        m2: float64, shape (channels,); divided by `n` it is the population variance.
    """

    n: int
    mean: Tensor
    m2: Tensor

    @classmethod
    def of(cls, inputs: Tensor) -> Moments:
        """The moments of one batch of shape (N, channels, …)."""
        # Apple's GPUs have no float64.
        values = inputs.detach().to(device="cpu" if inputs.device.type == "mps" else None, dtype=torch.float64)
        n = values.numel() // max(values.shape[1], 1)
        if n == 0:
            zeros = values.new_zeros(values.shape[1])
            return cls(0, zeros, zeros)
        dims = [dim for dim in range(values.ndim) if dim != 1]
        variance, mean = torch.var_mean(values, dim=dims, correction=0)
        return cls(n, mean, variance * n)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of inputs together.

        Source: Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances", eq. 2.1.
        """
        if not self.n or not other.n:
            return self if self.n else other
        n = self.n + other.n
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.n / n)
        return Moments(n, mean, self.m2 + other.m2 + delta * delta * (self.n * other.n / n))

    @property
    def variance(self) -> Tensor:
        """The population variance, float64, shape (channels,)."""
        return self.m2 / self.n


@dataclass(frozen=True, slots=True)
class BatchNormReport:
    """What a recalibration did.

    Attributes:
        method: how the statistics were computed.
        num_layers: BatchNorm layers that got new statistics.
        num_batches: calibration batches that ran.
        num_samples: samples in them (the length of the first tensor of each batch).
        layers_skipped: names of layers that never ran, and so kept their statistics.
        skipped: True when the model has no BatchNorm layer with statistics, so that no data was read.
    """

    method: Method
    num_layers: int = 0
    num_batches: int = 0
    num_samples: int = 0
    layers_skipped: tuple[str, ...] = ()
    skipped: bool = False


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    method: Method = "exact",
) -> BatchNormReport:
    """Recompute every BatchNorm layer's statistics for the model's current weights.

    While it runs, each layer normalises with the statistics of the batch at hand, as in training, so deeper layers
    see the inputs they will see later. ``num_batches_tracked`` becomes the number of batches the layer saw.

    Args:
        model: a model on the device where it shall run; only BatchNorm buffers change.
        batches: inputs of shape (N, …); tuples and lists count by their first element, dicts as keyword arguments.
        forward: called as ``forward(model, batch)`` instead, for models that take something else.
        device: where to move each batch first; None leaves it where it is.
        method: ``exact`` computes population statistics over all data, with the other layers in evaluation mode.
            ``update_bn`` reproduces `torch.optim.swa_utils.update_bn`: the mean over batches of each batch's
            unbiased variance, with the whole model in training mode. In both, layers that never ran keep their
            statistics.

    Returns:
        What was done; `skipped` when the model has no BatchNorm.

    Raises:
        EmptyCalibrationError: `batches` yielded nothing; the model is unchanged.
        InvalidInputError: a layer saw a single value per channel, or NaN or infinity; the model is unchanged.

    Source: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3; Izmailov et al. 2018, section 3.2.
    """
    if method not in ("exact", "update_bn"):
        raise InvalidInputError(f"method is {method!r}; it must be 'exact' or 'update_bn'")
    layers = _find_layers(model)
    if not layers:
        return BatchNormReport(method, skipped=True)
    trackers: list[_Tracker] = [_TRACKERS[method](name, layer) for name, layer in layers.items()]
    with _restored(model, trackers), torch.no_grad():
        _set_modes(model, trackers, method=method)
        num_batches, num_samples = _run(model, batches, forward=forward or _default_forward, device=device)
        if num_batches == 0:
            raise EmptyCalibrationError(
                "the calibration data yielded no batch, so BatchNorm statistics cannot be computed; the model is "
                "unchanged. Pass a re-iterable data set (an exhausted iterator is empty) with at least one batch"
            )
        found = [(tracker, tracker.result()) for tracker in trackers if tracker.num_calls]
    for tracker, (mean, variance) in found:
        _write(tracker.layer, mean=mean, variance=variance, num_batches=tracker.num_calls)
    idle = tuple(tracker.name for tracker in trackers if not tracker.num_calls)
    return BatchNormReport(method, len(found), num_batches, num_samples, layers_skipped=idle)


@dataclass
class _Tracker:
    """Follows one layer through the pass, by a hook before each call."""

    name: str
    layer: _BatchNorm
    num_calls: int = 0
    before: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.before = {name: buffer.detach().clone() for name, buffer in self.layer.named_buffers(recurse=False)}

    def prepare(self) -> None:
        """Set the layer up for the pass; the caller has put it into training mode."""
        raise NotImplementedError

    def observe(self, inputs: Tensor) -> None:
        """Take note of an input of the layer, right before it runs."""
        raise NotImplementedError

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and variance over the pass."""
        raise NotImplementedError

    def hook(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook."""
        self.observe(args[0] if args else kwargs["input"])

    def _checked(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        if not bool(torch.isfinite(mean).all() & torch.isfinite(variance).all()):
            raise InvalidInputError(
                f"the inputs of BatchNorm layer {self.name!r} hold NaN or infinity; the model is unchanged. Check "
                f"the calibration data, and whether the weights have diverged",
                code=_CODE,
            )
        return mean, variance


class _Exact(_Tracker):
    """Population moments of all inputs."""

    moments: Moments | None = None

    def prepare(self) -> None:
        """With momentum 0 the layer's own update leaves the given statistics alone during the pass."""
        self.layer.momentum = 0.0

    def observe(self, inputs: Tensor) -> None:
        """Merge the moments, and choose what this call normalises with."""
        batch = Moments.of(inputs)
        self.moments = self.moments.merge(batch) if self.moments else batch
        self.num_calls += 1
        # torch cannot normalise one value per channel by itself, so those are normalised with the statistics
        # given. SyncBatchNorm refuses CPUs and waits for other ranks in training mode; with the batch's statistics
        # as its own, evaluation mode computes the same.
        is_synchronised = isinstance(self.layer, nn.SyncBatchNorm)
        self.layer.training = batch.n > 1 and not is_synchronised
        if is_synchronised:
            is_enough = batch.n > 1
            _copy(self.layer.running_mean, batch.mean if is_enough else self.before["running_mean"])
            _copy(self.layer.running_var, batch.variance if is_enough else self.before["running_var"])

    def result(self) -> tuple[Tensor, Tensor]:
        """Population mean and variance."""
        if self.moments is None or self.moments.n <= 1:
            n = self.moments.n if self.moments else 0
            raise InvalidInputError(
                f"BatchNorm layer {self.name!r} saw {n} value(s) per channel in all the calibration data, and a "
                f"variance needs at least 2; the model is unchanged. Pass more data",
                code=_CODE,
            )
        return self._checked(self.moments.mean, self.moments.variance)


class _UpdateBn(_Tracker):
    """What `torch.optim.swa_utils.update_bn` computes, by the layer's own cumulative average."""

    def prepare(self) -> None:
        """As `update_bn` does: statistics from zero, a cumulative average over batches."""
        self.layer.reset_running_stats()
        self.layer.momentum = None

    def observe(self, inputs: Tensor) -> None:
        """Refuse what torch would refuse, in clearer words."""
        if inputs.numel() <= inputs.shape[1]:
            n = inputs.numel() // max(inputs.shape[1], 1)
            raise InvalidInputError(
                f"BatchNorm layer {self.name!r} got a batch of {n} value(s) per channel, and update_bn needs at "
                f"least 2 in each; the model is unchanged. Drop the short last batch or use method='exact'",
                code=_CODE,
            )
        self.num_calls += 1

    def result(self) -> tuple[Tensor, Tensor]:
        """The layer's own buffers."""
        mean, variance = self.layer.running_mean, self.layer.running_var
        assert mean is not None  # noqa: S101 - _find_layers takes no layer without buffers
        assert variance is not None  # noqa: S101
        return self._checked(mean.clone(), variance.clone())


_TRACKERS: dict[str, type[_Tracker]] = {"exact": _Exact, "update_bn": _UpdateBn}


def _find_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    layers: dict[str, _BatchNorm] = {}
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm):
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
def _restored(model: nn.Module, trackers: list[_Tracker]) -> Iterator[None]:
    """Undo everything on the way out: hooks, momentum, training flags and the layers' buffers."""
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for tracker in trackers:
            undo.callback(setattr, tracker.layer, "momentum", tracker.layer.momentum)
            undo.callback(_restore_buffers, tracker)
            undo.callback(tracker.layer.register_forward_pre_hook(tracker.hook, with_kwargs=True).remove)
        yield


def _restore_buffers(tracker: _Tracker) -> None:
    for name, buffer in tracker.layer.named_buffers(recurse=False):
        _copy(buffer, tracker.before[name])


def _set_modes(model: nn.Module, trackers: list[_Tracker], *, method: Method) -> None:
    if method == "update_bn":
        model.train()
    else:
        # The flags alone: an overridden train() or eval() may do more, and could not be undone.
        for module in model.modules():
            module.training = False
    for tracker in trackers:
        tracker.layer.training = True
        tracker.prepare()


def _run(
    model: nn.Module, batches: Iterable[Any], *, forward: Forward, device: torch.device | str | None
) -> tuple[int, int]:
    num_batches = num_samples = 0
    for batch in batches:
        forward(model, batch if device is None else _move(batch, device))
        num_batches += 1
        num_samples += _num_samples(batch)
    return num_batches, num_samples


def _default_forward(model: nn.Module, batch: Any) -> object:  # noqa: ANN401 - whatever a data loader yields
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _move(batch: Any, device: torch.device | str) -> Any:  # noqa: ANN401 - as above
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [_move(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def _num_samples(batch: Any) -> int:  # noqa: ANN401 - as above
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((found for part in parts if (found := _num_samples(part))), 0)


def _write(layer: _BatchNorm, *, mean: Tensor, variance: Tensor, num_batches: int) -> None:
    _copy(layer.running_mean, mean)
    _copy(layer.running_var, variance)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(num_batches)


@torch.no_grad()
def _copy(into: Tensor | None, values: Tensor) -> None:
    if into is not None:
        into.copy_(values)
