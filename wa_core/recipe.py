"""What a user writes to have something trained: model, optimizer, data, loss and metrics.

A recipe knows nothing of workers, checkpoints or averages. It keeps one invariant, on which exact recovery
rests: what it returns depends on its config, its seed and its arguments alone. All randomness comes from the
generator that the caller passes (or, inside the model, from torch's global generator, which the training loop
seeds at every step).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from wa_core.records import RecipeConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

Batch = Any  # whatever the recipe's own loss() and forward() take; the callers only pass it on


class Recipe(ABC):
    """One kind of training, with its config.

    Args:
        config: an instance of this class's `Config`.
        seed: what the initial weights and the order of the data derive from.
    """

    Config: ClassVar[type[RecipeConfig]] = RecipeConfig

    #: What `predict` takes one of: a pydantic model, or another type that pydantic checks. None: no predictions.
    Instance: ClassVar[Any] = None

    def __init__(self, config: RecipeConfig, *, seed: int = 0) -> None:
        self.config = config
        self.seed = seed

    @property
    def epochs(self) -> int:
        """How many times training goes over the data."""
        return self.config.epochs

    @property
    def batch_size(self) -> int:
        """Samples per step over all workers together."""
        return self.config.batch_size

    @property
    @abstractmethod
    def num_train_samples(self) -> int:
        """How many training samples there are."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """The model with its initial weights, drawn from torch's global generator (the caller seeds it)."""

    @abstractmethod
    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer of `model`'s parameters."""

    def build_scheduler(self, optimizer: Optimizer, *, total_steps: int) -> LRScheduler | None:  # noqa: ARG002
        """The learning rate schedule, stepped once per training step; None keeps the rate constant.

        Args:
            optimizer: what `build_optimizer` made.
            total_steps: training steps of the whole run.
        """
        return None

    @abstractmethod
    def train_batch(self, indices: Tensor, *, generator: torch.Generator) -> Batch:
        """Fetch and augment training samples.

        Args:
            indices: int64 of shape (n,), each in [0, num_train_samples).
            generator: the only source of randomness allowed here.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean training loss over `batch`: a scalar that carries gradients."""

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run `model` on the inputs of `batch`; what BatchNorm recalibration does with calibration batches."""

    @abstractmethod
    def calibration_batches(self) -> Iterable[Batch]:
        """Training data without augmentation, in a fixed order, for BatchNorm recalibration."""

    @abstractmethod
    def heldout_batches(self) -> Iterable[Batch]:
        """Data that training never sees, in a fixed order."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Metrics of `model` in eval mode over `batches`, as exact means over samples; always has ``loss``.

        The training mode of every module is restored afterwards, also when the model raises.
        """

    def evaluate_each(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor] | None:  # noqa: ARG002
        """What `evaluate` takes the means of: for each of its metrics the samples' values, in order.

        With them two sets of weights are compared sample by sample, which shows much smaller differences. None,
        the default, is for recipes that do not tell samples apart: they are compared batch by batch.

        Returns:
            By metric name, tensors of shape (n,); the same samples in the same order for any weights.
        """
        return None

    def predict(self, model: nn.Module, instances: list[Any]) -> list[Any]:
        """What `model` says of each of the instances, in their order, as JSON values.

        Args:
            model: in eval mode; no gradients are recorded.
            instances: checked `Instance`s, perhaps of several callers together.

        Raises:
            NotImplementedError: the recipe declares an `Instance` but does not define this.
        """
        raise NotImplementedError(f"{type(self).__name__} declares an Instance, so it must define predict()")

    def example_inputs(self) -> tuple[Tensor, ...] | None:
        """Inputs for ``model(*inputs)``, to export the model by; None, the default: it cannot be exported.

        The first axis of each is the batch, here of two or more samples; an exported model takes any number.
        """
        return None
