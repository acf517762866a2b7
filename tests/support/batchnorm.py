"""Models with BatchNorm and data for them; and what recalibrating may not touch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def network(*, dropout: float = 0.0) -> nn.Sequential:
    """Two BatchNorm layers of different kinds, the second one behind the first."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Flatten(),
        nn.Linear(4 * 36, 5),
        nn.BatchNorm1d(5, momentum=None),
        nn.Linear(5, 2),
    )


def images(*sizes: int, seed: int = 1) -> list[Tensor]:
    """Batches of 8 x 8 images."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 1, 8, 8, generator=draw) for size in sizes]


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Everything about a model that a recalibration might leave behind."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [(m.training, getattr(m, "momentum", None), len(m._forward_pre_hooks)) for m in model.modules()]
    return tensors, modes, torch.is_grad_enabled(), torch.get_rng_state().tolist()


def assert_unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    """No tensor, flag, momentum, hook, grad mode or random state differs."""
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
