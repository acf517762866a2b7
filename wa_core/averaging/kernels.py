"""Accumulators of lists of tensors, blended by one kernel per device and dtype where torch has one.

It knows tensors; what is averaged, and with which weights, is its callers' affair. The invariant: an accumulator
never has less precision than float32, nor than what is folded into it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

# Elements converted at a time: on the CPU so few that they are still in cache when they are folded; elsewhere so
# many that starting kernels costs nothing, and so few that the copies take little memory.
_CPU_BATCH = 1 << 20
_BATCH = 1 << 24
_DOUBLE = (torch.float64, torch.complex128)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that averages tensors of `dtype`: at least float32; integers and bools stay as they are."""
    if dtype.is_floating_point:
        return torch.promote_types(torch.float32, dtype) if torch.finfo(dtype).bits >= 16 else torch.float32  # noqa: PLR2004
    return torch.complex64 if dtype == torch.complex32 else dtype


def new_accumulator(like: Tensor, values: Tensor | None = None) -> Tensor:
    """A tensor of `like`'s shape and device with the accumulator's dtype and a copy of `values` (or of `like`)."""
    source = (like if values is None else values).detach()
    dtype = torch.promote_types(accumulator_dtype(source.dtype), accumulator_dtype(like.dtype))
    return torch.empty_like(like, dtype=dtype, requires_grad=False).copy_(source)


def new_accumulators(sources: Mapping[str, Tensor], *, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """For each name in `dtypes` a contiguous tensor of that dtype, on its source's device, with a copy of it."""
    found: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(dtypes.values()):
        names = [name for name, one in dtypes.items() if one == dtype]
        room = _room(sum(sources[name].numel() for name in names if sources[name].device.type == "cpu"), dtype)
        for name in names:
            source = sources[name].detach()
            if source.device.type == "cpu":
                place, room = room.tensor_split([source.numel()])
                found[name] = place.view(source.shape).copy_(source)
            else:
                found[name] = torch.empty(source.shape, dtype=dtype, device=source.device).copy_(source)
    return {name: found[name] for name in dtypes}


def _room(num_elements: int, dtype: torch.dtype) -> Tensor:
    # NumPy asks for huge pages, with which a fold takes a tenth less time than in the memory that torch gets.
    return torch.from_numpy(np.empty(num_elements * dtype.itemsize, np.uint8)).view(dtype)


def blend(averages: list[Tensor], tensors: list[Tensor], *, weight: float) -> None:
    """``average += weight * (tensor - average)`` in place, pair by pair; integers and bools take the latest.

    Args:
        averages: accumulators, each on its tensor's device and of its shape.
        tensors: what to fold in.
        weight: in [0, 1].
    """
    kinds: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for average, tensor in zip(averages, tensors, strict=True):
        into, source = kinds[average.device, average.dtype, tensor.dtype]
        into.append(average)
        source.append(tensor)
    for (_, dtype, tensor_dtype), (into, source) in kinds.items():
        if not (dtype.is_floating_point or dtype.is_complex):
            torch._foreach_copy_(into, source)
        elif dtype == tensor_dtype:
            _lerp(into, source, weight)
        else:
            _blend_converted(into, source, weight)


def pool(
    means: list[Tensor],
    variances: list[Tensor],
    new_means: list[Tensor],
    new_variances: list[Tensor],
    *,
    weight: float,
) -> None:
    """Fold the moments of one more distribution into those of a mixture, in place, pair by pair.

    ``v += w (v_i - v) + w (1 - w) (m_i - m)²`` with the mean before the fold, then ``m += w (m_i - m)``. What is
    constant stays exactly constant, and no variance becomes negative.

    Args:
        means: of the mixtures; accumulators.
        variances: the same.
        new_means: to fold in, each with its accumulator's dtype and shape.
        new_variances: the same.
        weight: in [0, 1].

    Source: the law of total variance; see `wa_core.averaging.tensor_policy`.
    """
    spreads = list(torch._foreach_sub(new_means, means))  # noqa: SLF001  torch has no other name for it
    torch._foreach_mul_(spreads, spreads)
    torch._foreach_mul_(spreads, weight * (1.0 - weight))
    _lerp(variances, new_variances, weight)
    torch._foreach_add_(variances, spreads)
    _lerp(means, new_means, weight)


def rounds_to_one(weight: float, dtype: torch.dtype) -> bool:
    """Whether a fold of this weight into accumulators of `dtype` replaces them.

    Then they are copied: torch's lerp computes ``new - 0 * (new - old)``, whose zeros have other signs in its
    vectorised loop than in the loop over the last few elements, so that bits would depend on where a block ends.
    """
    return (weight if dtype in _DOUBLE else float(np.float32(weight))) == 1.0


def _lerp(averages: list[Tensor], tensors: list[Tensor], weight: float) -> None:
    if not rounds_to_one(weight, torch.float32):
        torch._foreach_lerp_(averages, tensors, weight)
        return
    for average, tensor in zip(averages, tensors, strict=True):
        if rounds_to_one(weight, average.dtype):
            average.copy_(tensor)
        else:
            average.lerp_(tensor, weight)


def _blend_converted(averages: list[Tensor], tensors: list[Tensor], weight: float) -> None:
    size = _CPU_BATCH if averages[0].device.type == "cpu" else _BATCH
    into: list[Tensor] = []
    sources: list[Tensor] = []
    for average, tensor in zip(averages, tensors, strict=True):
        is_flat = average.is_contiguous() and tensor.is_contiguous()
        into += torch.split(average.view(-1), size) if is_flat else [average]
        sources += torch.split(tensor.view(-1), size) if is_flat else [tensor]
    begin = num_elements = 0
    for end, piece in enumerate(into, 1):
        num_elements += piece.numel()
        if num_elements >= size or end == len(into):
            wide = [torch.empty_like(piece) for piece in into[begin:end]]
            torch._foreach_copy_(wide, sources[begin:end])
            _lerp(into[begin:end], wide, weight)
            begin, num_elements = end, 0
