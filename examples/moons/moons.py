"""Two interleaved half moons and a small net with BatchNorm: a complete recipe in one file.

Send it with `wa submit moons:Moons --package examples/moons`; `docs/guides/recipe.md` walks through it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.nn import functional

from wa_core.recipe import Recipe
from wa_core.records import RecipeConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch.optim import Optimizer

Points = tuple[Tensor, Tensor]  # float32 (n, 2) and int64 (n,)

NUM_TRAIN, NUM_HELDOUT = 1024, 512


class MoonsConfig(RecipeConfig):
    """What `-c key=value` may set; a value out of bounds is refused before anything is trained."""

    epochs: int = Field(default=10, ge=1, le=1_000)
    batch_size: int = Field(default=64, ge=2, le=NUM_TRAIN)
    lr: float = Field(default=0.2, gt=0, le=10)
    width: int = Field(default=32, ge=1, le=1_024)
    noise: float = Field(default=0.25, ge=0, le=1)


class Point(BaseModel):
    """What a trained average can be asked about: one point."""

    x: float
    y: float


class Moons(Recipe):
    """Tell two moons apart."""

    Config: ClassVar[type[RecipeConfig]] = MoonsConfig
    Instance: ClassVar[type[Point]] = Point
    config: MoonsConfig

    def __init__(self, config: MoonsConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self._train = _moons(NUM_TRAIN, noise=config.noise, seed=1)
        self._heldout = _moons(NUM_HELDOUT, noise=config.noise, seed=2)

    @property
    def num_train_samples(self) -> int:
        """1024."""
        return NUM_TRAIN

    def build_model(self) -> nn.Module:
        """Two hidden layers with BatchNorm."""
        width = self.config.width
        return nn.Sequential(
            *(nn.Linear(2, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
            nn.Linear(width, 2),
        )

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """SGD at a constant, high rate: what averaging wants."""
        return torch.optim.SGD(model.parameters(), lr=self.config.lr, momentum=0.9)

    def train_batch(self, indices: Tensor, *, generator: torch.Generator) -> Points:
        """Training points, jittered a little."""
        points, labels = self._train[0][indices], self._train[1][indices]
        return points + 0.05 * torch.randn(points.shape, generator=generator), labels

    def loss(self, model: nn.Module, batch: Points) -> Tensor:
        """Mean cross-entropy."""
        return functional.cross_entropy(model(batch[0]), batch[1])

    def forward(self, model: nn.Module, batch: Points) -> Tensor:
        """Logits."""
        logits: Tensor = model(batch[0])
        return logits

    def calibration_batches(self) -> Iterator[Points]:
        """The training points as they are."""
        return zip(self._train[0].split(256), self._train[1].split(256), strict=True)

    def heldout_batches(self) -> Iterator[Points]:
        """Points that training never sees."""
        return zip(self._heldout[0].split(256), self._heldout[1].split(256), strict=True)

    def evaluate(self, model: nn.Module, batches: Iterable[Points]) -> dict[str, float]:
        """Held-out ``loss`` and ``accuracy``."""
        return {name: float(values.mean()) for name, values in self.evaluate_each(model, batches).items()}

    @torch.no_grad()
    def evaluate_each(self, model: nn.Module, batches: Iterable[Points]) -> dict[str, Tensor]:
        """Each point's ``loss`` and ``accuracy`` (0 or 1), by which averaged and raw are compared."""
        was_training = model.training
        model.eval()
        try:
            found = [(model(points).double(), labels) for points, labels in batches]
        finally:
            model.train(was_training)
        logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        losses = functional.cross_entropy(logits, labels, reduction="none")
        return {"loss": losses, "accuracy": (logits.argmax(dim=1) == labels).double()}

    def predict(self, model: nn.Module, instances: list[Point]) -> list[list[float]]:
        """The probabilities of the two moons."""
        points = torch.tensor([[one.x, one.y] for one in instances])
        probabilities: list[list[float]] = model(points).softmax(dim=1).tolist()
        return probabilities

    def example_inputs(self) -> tuple[Tensor]:
        """Two points, to export the model by."""
        return (self._heldout[0][:2],)


def _moons(num_points: int, *, noise: float, seed: int) -> Points:
    generator = torch.Generator().manual_seed(seed)
    angle = math.pi * torch.rand(num_points, generator=generator)
    labels = torch.arange(num_points) % 2
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
    points = torch.where(labels[:, None] == 0, upper, lower)
    return points + noise * torch.randn(points.shape, generator=generator), labels
