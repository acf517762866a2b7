"""Weights that are spread over processes (FSDP2, tensor parallelism), gathered for a checkpoint.

It knows `torch.distributed.checkpoint`; not what the weights are for. The invariant: every rank takes part, and
the first one alone gets them, whole, in host memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import distributed

if TYPE_CHECKING:
    from torch import Tensor, nn


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of a module whose parameters may be sharded; to be called on every rank.

    Returns:
        On rank 0, or without sharding, all tensors under the module's names; on other ranks of a sharded module,
        nothing. Gathered tensors are new ones on the CPU.

    Source: ``torch.distributed.checkpoint.state_dict.get_model_state_dict``.
    """
    if not distributed.is_available() or not distributed.is_initialized() or not _is_sharded(model):
        return dict(model.state_dict())
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast("dict[str, Tensor]", get_model_state_dict(model, options=options))


def _is_sharded(model: nn.Module) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
