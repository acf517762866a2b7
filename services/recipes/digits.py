"""Handwritten digits (8x8 grey images, bundled with scikit-learn) and a small residual net with BatchNorm.

Real data that needs no download, and a training that takes seconds: what the demo and the tests run. It knows
nothing of workers or checkpoints. Source of the data: Alpaydin & Kaynak 1998, "Optical Recognition of
Handwritten Digits", UCI; the schedule: Izmailov et al. 2018, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from services.recipes.digits_config import (
    MAX_GREY,
    NUM_HELDOUT_SAMPLES,
    NUM_TRAIN_SAMPLES,
    DigitsConfig,
    DigitsInstance,
)
from wa_core.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from wa_core.records import RecipeConfig

Labelled = tuple[Tensor, Tensor]  # float32 images (n, 1, 8, 8) and int64 digits (n,)

SPLIT_SEED = 0
EVAL_BATCH_SIZE = 256
MAX_SHIFT = 1
NOISE_STD = 0.1


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a shortcut; `stride` halves the image when 2."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, in_channels, h, w) to (n, out_channels, h / stride, w / stride)."""
        hidden = functional.relu(self.bn1(self.conv1(inputs)))
        return functional.relu(self.bn2(self.conv2(hidden)) + self.shortcut(inputs))


class DigitsNet(nn.Module):
    """A stem, three residual blocks down to 2x2 pixels, and a linear head over the pooled channels."""

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            ResidualBlock(width, width, stride=1),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 4 * width, stride=2),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, 1, 8, 8) to logits (n, 10)."""
        features: Tensor = self.blocks(self.stem(images))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


class Digits(Recipe):
    """Classify handwritten digits; the same split and the same samples in every run."""

    Config: ClassVar[type[RecipeConfig]] = DigitsConfig
    Instance: ClassVar[type[DigitsInstance]] = DigitsInstance
    config: DigitsConfig

    def __init__(self, config: DigitsConfig, *, seed: int = 0) -> None:
        super().__init__(config, seed=seed)
        self._train, self._heldout, self._scale = _load_split()

    @property
    def num_train_samples(self) -> int:
        """1437."""
        return len(self._train[1])

    def build_model(self) -> nn.Module:
        """A `DigitsNet` of the config's width."""
        return DigitsNet(width=self.config.width)

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """SGD with momentum and weight decay, as in the paper."""
        return torch.optim.SGD(
            model.parameters(),
            lr=self.config.lr,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
        )

    def build_scheduler(self, optimizer: Optimizer, *, total_steps: int) -> LRScheduler:  # noqa: ARG002
        """Linear warm-up, then a constant rate until the end."""
        warmup_steps = self.config.warmup_steps
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup_steps + 1)))

    def train_batch(self, indices: Tensor, *, generator: torch.Generator) -> Labelled:
        """Images shifted by up to a pixel, with a little noise."""
        images, labels = self._train[0][indices], self._train[1][indices]
        padded = functional.pad(images, (MAX_SHIFT,) * 4, value=float(images.min()))
        size = images.shape[-1]
        offsets = torch.randint(0, 2 * MAX_SHIFT + 1, (len(images), 2), generator=generator)
        shifted = torch.stack(
            [
                image[:, row : row + size, column : column + size]
                for image, (row, column) in zip(padded, offsets.tolist(), strict=True)
            ]
        )
        return shifted + NOISE_STD * torch.randn(shifted.shape, generator=generator), labels

    def loss(self, model: nn.Module, batch: Labelled) -> Tensor:
        """Mean cross-entropy."""
        images, labels = batch
        return functional.cross_entropy(model(images), labels)

    def forward(self, model: nn.Module, batch: Labelled) -> Tensor:
        """Logits of the batch's images."""
        logits: Tensor = model(batch[0])
        return logits

    def calibration_batches(self) -> Iterator[Labelled]:
        """All training samples as they are."""
        return _batches(self._train)

    def heldout_batches(self) -> Iterator[Labelled]:
        """The 360 samples that are never trained on."""
        return _batches(self._heldout)

    def evaluate(self, model: nn.Module, batches: Iterable[Labelled]) -> dict[str, float]:
        """Held-out ``loss`` (cross-entropy, nats) and ``accuracy`` (0 to 1)."""
        return {name: float(values.mean()) for name, values in self.evaluate_each(model, batches).items()}

    def evaluate_each(self, model: nn.Module, batches: Iterable[Labelled]) -> dict[str, Tensor]:
        """Each sample's ``loss`` and ``accuracy`` (0 or 1), as float64."""
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            return _measure(model, batches)
        finally:
            for module, training in modes.items():
                module.training = training

    def predict(self, model: nn.Module, instances: list[DigitsInstance]) -> list[dict[str, object]]:
        """The likeliest ``digit``, and the ``probabilities`` of 0 to 9."""
        images = torch.tensor([one.image for one in instances]).div(MAX_GREY).unsqueeze(1)
        found = model(self._scale.apply(images)).double().softmax(dim=1)
        return [{"digit": int(each.argmax()), "probabilities": each.tolist()} for each in found]

    def example_inputs(self) -> tuple[Tensor]:
        """Two held-out images, standardised: float32 (2, 1, 8, 8)."""
        return (self._heldout[0][:2],)


@dataclass(frozen=True, slots=True)
class Standard:
    """What images are standardised by: the training images' mean and deviation."""

    mean: Tensor
    std: Tensor

    def apply(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the model takes them."""
        return (images - self.mean) / self.std


@torch.no_grad()
def _measure(model: nn.Module, batches: Iterable[Labelled]) -> dict[str, Tensor]:
    losses, hits = [], []
    for images, labels in batches:
        logits = model(images).double()
        losses.append(functional.cross_entropy(logits, labels, reduction="none"))
        hits.append((logits.argmax(dim=1) == labels).double())
    return {"loss": torch.cat(losses), "accuracy": torch.cat(hits)}


def _batches(data: Labelled) -> Iterator[Labelled]:
    return zip(torch.split(data[0], EVAL_BATCH_SIZE), torch.split(data[1], EVAL_BATCH_SIZE), strict=True)


def _load_split() -> tuple[Labelled, Labelled, Standard]:
    bundle = load_digits()
    images = torch.from_numpy(bundle.images).float().div(MAX_GREY).unsqueeze(1)
    labels = torch.from_numpy(bundle.target).long()
    train, heldout = train_test_split(
        torch.arange(len(labels)).numpy(),
        train_size=NUM_TRAIN_SAMPLES,
        test_size=NUM_HELDOUT_SAMPLES,
        stratify=labels.numpy(),
        random_state=SPLIT_SEED,
    )
    scale = Standard(images[train].mean(), images[train].std())
    standardised = scale.apply(images)
    return (standardised[train], labels[train]), (standardised[heldout], labels[heldout]), scale
