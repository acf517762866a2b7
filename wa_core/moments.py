"""Count, mean and spread of a layer's inputs, exact and mergeable.

It knows tensors; it does not know layers or models. The invariant: moments computed apart and merged are those of
all values together, to float64 rounding, however the values are cut, ordered or laid out in memory, and however
far their mean is from zero. The same values cut in the same way give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from wa_core.errors import InvalidInputError

# Values converted to float64 at a time: 2 MiB of them, so that a block is still in cache when it is summed.
_BLOCK = 1 << 18
# From mean² / variance = 10⁴ on, sums of squares in float64 have lost 4 of their 16 digits, so the values are gone
# through again around the mean just found. Most layers' inputs never come near.
_LARGE_MEAN = 1e4


@dataclass(frozen=True, slots=True)
class Moments:
    """What shards compute apart and then merge: the moments of all values of each channel.

    Attributes:
        n: values per channel.
        mean: float64, shape (channels,).
        m2: float64, shape (channels,): the sum of squared deviations.
        num_batches: how many batches they are of.
    """

    n: int
    mean: Tensor
    m2: Tensor
    num_batches: int = 1

    @classmethod
    def of(cls, inputs: Tensor) -> Self:
        """The moments of one batch of shape (N, channels, …)."""
        values = _readable(inputs)
        n = values.numel() // max(values.shape[1], 1)
        if n == 0:
            zeros = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
            return cls(0, zeros, zeros)
        if values.device.type != "cpu":
            dims = [dim for dim in range(values.ndim) if dim != 1]
            variance, mean = torch.var_mean(values.double(), dim=dims, correction=0)
            return cls(n, mean, variance * n)
        mean, m2 = _moments(values, around=None)
        if bool((mean.square() * n > _LARGE_MEAN * m2).any()):
            mean, m2 = _moments(values, around=mean)
        return cls(n, mean, m2)

    def merge(self, other: Self) -> Self:
        """The moments of both sets of inputs together.

        Source: Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances", eq. 2.1.
        """
        num_batches = self.num_batches + other.num_batches
        if not self.n or not other.n:
            return replace(self if self.n else other, num_batches=num_batches)
        n = self.n + other.n
        delta = other.mean.to(self.mean.device) - self.mean
        m2 = self.m2 + other.m2.to(self.m2.device) + delta * delta * (self.n * other.n / n)
        return replace(self, n=n, mean=self.mean + delta * (other.n / n), m2=m2, num_batches=num_batches)

    @property
    def variance(self) -> Tensor:
        """The population variance, float64, shape (channels,)."""
        return self.m2 / self.n


@dataclass(frozen=True, slots=True)
class InstanceMoments(Moments):
    """Means over instances of each instance's own mean and variance: what InstanceNorm normalises with.

    Here `n` counts instances, whatever their size, and the spread between instances is left out.
    """

    @classmethod
    def of(cls, inputs: Tensor) -> Self:
        """The moments of one batch of shape (N, channels, …)."""
        values = _readable(inputs).double().flatten(2)
        n = len(values)
        if values.numel() == 0:
            zeros = values.new_zeros(values.shape[1])
            return cls(0, zeros, zeros)
        variance, mean = torch.var_mean(values, dim=2, correction=0)
        return cls(n, mean.mean(0), variance.sum(0))

    def merge(self, other: Self) -> Self:
        """The moments of both sets of instances together."""
        n = self.n + other.n
        mean = self.mean + (other.mean.to(self.mean.device) - self.mean) * (other.n / max(n, 1))
        m2 = self.m2 + other.m2.to(self.m2.device)
        return replace(self, n=n, mean=mean, m2=m2, num_batches=self.num_batches + other.num_batches)


def check_moments(name: str, moments: Moments) -> None:
    """Refuse moments that give no statistics.

    Raises:
        InvalidInputError: code `calibration_failed`: too few values, or NaN or infinity among them.
    """
    needed = 1 if isinstance(moments, InstanceMoments) else 2
    if moments.n < needed:
        raise InvalidInputError(
            f"BatchNorm layer {name!r} saw {moments.n} value(s) per channel in all the calibration data, and a "
            f"variance needs at least {needed}; the model is unchanged. Pass more data",
            code="calibration_failed",
        )
    if not bool(torch.isfinite(moments.mean).all() & torch.isfinite(moments.m2).all()):
        raise InvalidInputError(
            f"the inputs of BatchNorm layer {name!r} hold NaN or infinity; the model is unchanged. Check the "
            f"calibration data, and whether the weights have diverged",
            code="calibration_failed",
        )


def _readable(inputs: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    return inputs.detach().cpu() if inputs.device.type == "mps" else inputs.detach()


def _moments(values: Tensor, *, around: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of each channel, from sums of deviations from `around` (or from 0)."""
    channels, n = values.shape[1], values.numel() // values.shape[1]
    channels_last = values.movedim(1, -1)
    if channels_last.is_contiguous():
        total, squares = _sum_columns(channels_last.reshape(-1, channels), around)
    else:
        matrix = values.reshape(len(values) * channels, -1)
        by_row = _sum_rows(matrix, None if around is None else around.repeat(len(values)))
        total, squares = (sums.view(-1, channels).sum(0) for sums in by_row)
    mean = total / n
    m2 = (squares - total * mean).clamp_(min=0)
    return (mean if around is None else around + mean), m2


def _sum_columns(matrix: Tensor, around: Tensor | None) -> tuple[Tensor, Tensor]:
    height, width = matrix.shape
    step = min(height, max(1, _BLOCK // width))
    # Block upon block, and columns only at the end: threads share that out well, and sums over columns badly.
    total = _deviations(matrix[:step], around, torch.empty((step, width), dtype=torch.float64))
    squares = total.square()
    room = torch.empty_like(total) if step < height else total
    for begin in range(step, height, step):
        deviations = _deviations(matrix[begin : begin + step], around, room)
        total[: len(deviations)].add_(deviations)
        squares[: len(deviations)].addcmul_(deviations, deviations)
    return total.sum(0), squares.sum(0)


def _sum_rows(matrix: Tensor, around: Tensor | None) -> tuple[Tensor, Tensor]:
    height, width = matrix.shape
    step = min(height, max(1, _BLOCK // width))
    room = torch.empty((step, width), dtype=torch.float64)
    total, norms = torch.empty(height, dtype=torch.float64), torch.empty(height, dtype=torch.float64)
    for begin in range(0, height, step):
        rows = slice(begin, begin + step)
        deviations = _deviations(matrix[rows], None if around is None else around[rows, None], room)
        # No matrix product: MKL and torch taking turns with the threads costs more than the work itself.
        torch.sum(deviations, dim=1, out=total[rows])
        torch.linalg.vector_norm(deviations, dim=1, out=norms[rows])
    return total, norms.square_()


def _deviations(block: Tensor, around: Tensor | None, room: Tensor) -> Tensor:
    # Converted in place: an operation on both dtypes would convert into fresh memory each time.
    found = room[: len(block)].copy_(block)
    return found if around is None else found.sub_(around)
