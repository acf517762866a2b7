"""Training in a few lines, and averages by brute force, for tests of the optimizer wrapper."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from wa_core.optimizer import WeightAverage

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer

LAST = 40
INNER: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda params: SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "sgd-nesterov-foreach": lambda params: SGD(params, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "sgd-fused": lambda params: SGD(params, lr=0.05, momentum=0.9, fused=True),
    "sgd-maximize": lambda params: SGD(params, lr=0.001, maximize=True),
    "adam": lambda params: Adam(params, lr=0.01),
    "adam-foreach-amsgrad": lambda params: Adam(params, lr=0.01, foreach=True, amsgrad=True),
    "adam-tensor-rate": lambda params: Adam(params, lr=torch.tensor(0.01), foreach=False),
    "adamw-fused": lambda params: AdamW(params, lr=0.01, fused=True),
}
MODES: list[Any] = ["swa", 0.9, 0.0]


def network(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A small network with a scalar parameter among others."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.PReLU(), nn.Linear(7, 3)).to(dtype)


def train(
    model: nn.Module, optimizer: WeightAverage | Optimizer, steps: range, *, closure: bool = False
) -> list[list[Tensor]]:
    """Train on data drawn for each step; the parameters after every step, in float64."""
    seen = []
    for step in steps:
        first = next(model.parameters())
        inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)).to(first)

        def evaluate(inputs: Tensor = inputs) -> Tensor:
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        if closure:
            optimizer.step(evaluate)  # type: ignore[arg-type]
        else:
            evaluate()
            optimizer.step()
        seen.append([param.detach().double().clone() for param in model.parameters()])
    return seen


def mean(seen: list[list[Tensor]], *, mode: str | float = "swa") -> list[Tensor]:
    """The average in float64 by brute force: weights 1, or decay ** age, divided by their sum."""
    weights = [1.0 if mode == "swa" else float(mode) ** age for age in reversed(range(len(seen)))]
    return [
        sum((w * tensor for w, tensor in zip(weights, tensors, strict=True)), torch.tensor(0.0)) / sum(weights)
        for tensors in zip(*seen, strict=True)
    ]


def averages(model: nn.Module, optimizer: WeightAverage) -> list[Tensor]:
    """What an evaluation with the averages in place would see."""
    with optimizer.averaged():
        return [param.detach().clone() for param in model.parameters()]


def weights(model: nn.Module) -> list[Tensor]:
    """A copy of the parameters."""
    return [param.detach().clone() for param in model.parameters()]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-6) -> None:
    """All tensors agree within the tolerance, relative or absolute."""
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """All tensors are bit for bit the same."""
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def saved(optimizer: WeightAverage) -> dict[str, Any]:
    """The state dict through a file, read with weights_only."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def make(model: nn.Module, *, mode: str | float = "swa", inner: str = "sgd") -> WeightAverage:
    """A wrapper in automatic mode over two groups of the model's parameters."""
    params = list(model.parameters())
    return WeightAverage(INNER[inner]([{"params": params[:2]}, {"params": params[2:]}]), 3, 2, 0.02, mode)
