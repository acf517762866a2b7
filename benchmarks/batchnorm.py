"""BatchNorm recalibration beside `torch.optim.swa_utils.update_bn`: time, and errors on seven data sets.

`python -m benchmarks.batchnorm` times both, alternating in one process, on a ResNet-18 for 32 x 32 images, and
computes each one's largest relative variance error against float64. Writes
`benchmarks/results/batchnorm.{json,md}`.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from benchmarks import results
from wa_core.batchnorm import recalibrate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))
PEER = "update_bn"
OURS = "recalibrate"
SAMPLES = 640


class Block(nn.Module):
    """A basic block of ResNet-18."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        is_same = stride == 1 and width_in == width
        self.shortcut = (
            nn.Identity()
            if is_same
            else nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Two convolutions and the shortcut."""
        return torch.relu(self.body(inputs) + self.shortcut(inputs))


def resnet18() -> nn.Module:
    """ResNet-18 with the stem for 32 x 32 images; 20 BatchNorm layers."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    width_in = 64
    for width, stride in STAGES:
        layers += [Block(width_in, width, stride), Block(width, width, 1)]
        width_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def data_sets() -> dict[str, list[Tensor]]:
    """What `recalibrate` has to be exact on: batches of three channels."""
    draw = torch.Generator().manual_seed(7)
    plain = torch.randn(SAMPLES, 3, generator=draw)
    shift = torch.arange(10).repeat_interleave(SAMPLES // 10)[:, None] * torch.tensor([1.0, 3.0, 5.0])
    shuffled = (plain + shift)[torch.randperm(SAMPLES, generator=draw)]
    return {
        "i.i.d., batch 64": list(torch.split(plain, 64)),
        "i.i.d., batch 2": list(torch.split(plain, 2)),
        "short last batch": list(torch.split(plain[: SAMPLES - 62], 64)),
        "class-sorted": list(torch.split(plain + shift, 64)),
        "shuffled, batch 4": list(torch.split(shuffled, 4)),
        "mean/std 1,000": list(torch.split(plain + 1e3, 32)),
        "mean/std 10,000": list(torch.split(plain + 1e4, 32)),
    }


def variance_error(calibrate: Callable[[nn.Module, Sequence[Tensor]], object], batches: Sequence[Tensor]) -> float:
    """The largest relative error of any channel's variance."""
    layer = nn.BatchNorm1d(3)
    calibrate(layer, batches)
    exact = torch.cat(list(batches)).double().var(0, correction=0)
    assert layer.running_var is not None
    return float(((layer.running_var.double() - exact) / exact).abs().max())


def measure(*, rounds: int, batch_size: int, num_batches: int) -> dict[str, list[float]]:
    """Seconds of every pass, by kind; each round begins with another kind."""
    model = resnet18()
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randn(batch_size, 3, 32, 32, generator=draw) for _ in range(num_batches)]
    last = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
    kinds: dict[str, Callable[[], object]] = {
        PEER: lambda: update_bn(batches, model),
        OURS: lambda: recalibrate(model, batches),
        f"{PEER}, channels last": lambda: update_bn(last, model),
        f"{OURS}, channels last": lambda: recalibrate(model, last),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    names = list(kinds)
    for name in names:
        kinds[name]()
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter()
            kinds[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def markdown(data: dict[str, Any]) -> str:
    """The tables that people read."""
    peer = median(data["seconds"][PEER])
    title = (
        f"ResNet-18 on 32 x 32 images, {data['num_batches']} batches of {data['batch_size']}, float32, torch "
        f"{data['torch']}, {data['threads']} threads. Medians of {data['rounds']} passes, alternating in one "
        f"process; below 1 is faster than {PEER}."
    )
    rows = [
        [name, f"{median(values):.3f} s", f"{min(values):.3f} s", f"{median(values) / peer:.2f}"]
        for name, values in data["seconds"].items()
    ]
    errors = [[name, f"{found[OURS]:.1e}", f"{found[PEER]:.1e}"] for name, found in data["errors"].items()]
    return (
        f"{title}\n\n{results.table(['pass', 'median', 'fastest', 'ratio of medians'], rows)}\n"
        f"Largest relative error of the variance against float64:\n\n{results.table(['data', OURS, PEER], errors)}"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=6)
    options = parser.parse_args()
    data: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "batch_size": options.batch_size,
        "num_batches": options.batches,
        "errors": {
            name: {
                OURS: variance_error(recalibrate, batches),
                PEER: variance_error(lambda model, data: update_bn(data, model), batches),
            }
            for name, batches in data_sets().items()
        },
        "seconds": measure(rounds=options.rounds, batch_size=options.batch_size, num_batches=options.batches),
    }
    results.write("batchnorm", data=data, text=markdown(data))


if __name__ == "__main__":
    main()
