"""A recipe whose weights are given, for tests of what is done with weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wa_core.recipe import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn


class Untrained(Recipe):
    """A recipe that nobody trains: only model and data are to be written."""

    num_train_samples = 0

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Never trained."""
        raise AssertionError

    def train_batch(self, indices: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
        """Never trained."""
        raise AssertionError

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """Never trained."""
        raise AssertionError
