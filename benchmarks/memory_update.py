"""The in-memory update of an average of 25 million float32 parameters, beside torch's own.

`python -m benchmarks.memory_update` times, alternating in one process, one update of torch's `AveragedModel`
(its foreach path), of `WeightAverage` and of `ShadowWeights`, for the running mean and for an EMA; medians and
ratios go to `benchmarks/results/memory_update.{json,md}`. `ShadowWeights.fold` also walks `state_dict()` and
checks names, shapes and dtypes. Unless told otherwise it refuses NaN and infinity before it changes anything, so
that it has to read the weights twice; the row `AveragedModel, checked` is AveragedModel after the same refusal.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from benchmarks import results
from wa_core.averaging.rules import EmaRule, SwaRule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.optimizer import WeightAverage

if TYPE_CHECKING:
    from collections.abc import Callable

DECAY = 0.999
PEER = "AveragedModel"


def main() -> None:
    """Measure, write both files and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=41, help="updates of each kind that are timed")
    rounds = parser.parse_args().rounds
    model = network()
    report: dict[str, Any] = {
        "num_parameters": sum(param.numel() for param in model.parameters()),
        "num_tensors": len(model.state_dict()),
        "rounds": rounds,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.backends.cpu.get_cpu_capability()}",
        "seconds": {mode: measure(updates(model, mode), rounds) for mode in ("swa", "ema")},
    }
    results.write("memory_update", data=report, text=markdown(report))


def network() -> nn.Module:
    """A residual network's mix of tensors: some large, many small, BatchNorm buffers; about 25 M parameters."""
    torch.manual_seed(0)
    shape = (
        [(64, 64, 3)] * 6 + [(128, 128, 3)] * 8 + [(256, 256, 3)] * 12 + [(512, 512, 3)] * 6 + [(512, 512, 1)] * 6
    )
    layers = [nn.Sequential(nn.Conv2d(a, b, size, bias=False), nn.BatchNorm2d(b)) for a, b, size in shape]
    return nn.Sequential(*layers, nn.Linear(512, 1000))


def updates(model: nn.Module, mode: str) -> dict[str, Callable[[], object]]:
    """One update of each implementation, by name; each keeps an average of its own."""
    kernel = get_swa_multi_avg_fn() if mode == "swa" else get_ema_multi_avg_fn(DECAY)
    peer, checked = (AveragedModel(model, multi_avg_fn=kernel) for _ in range(2))
    wrapper = WeightAverage(torch.optim.SGD(model.parameters(), lr=0.1), mode="swa" if mode == "swa" else DECAY)
    rule = SwaRule() if mode == "swa" else EmaRule(decay=DECAY)
    shadow, unchecked = ShadowWeights(rule), ShadowWeights(rule)

    def check_and_update() -> None:
        assert all(bool(torch.stack(param.aminmax()).isfinite().all()) for param in model.parameters())
        checked.update_parameters(model)

    return {
        PEER: lambda: peer.update_parameters(model),
        "WeightAverage.update_swa": wrapper.update_swa,
        "ShadowWeights.fold": lambda: shadow.fold(model.state_dict(), step=shadow.n_averaged + 1),
        "ShadowWeights.fold(check_finite=False)": lambda: unchecked.fold(
            model.state_dict(), step=unchecked.n_averaged + 1, check_finite=False
        ),
        "AveragedModel, checked": check_and_update,
    }


def measure(kinds: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every update, by name; the first three of each are not timed (the first one copies)."""
    for _ in range(3):
        for update in kinds.values():
            update()
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    names = list(kinds)
    for turn in range(rounds):
        # Each follows each other one equally often.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            begin = time.perf_counter()
            kinds[name]()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def markdown(report: dict[str, Any]) -> str:
    """The table that people read."""
    lines = [
        (
            f"{report['num_parameters'] / 1e6:.1f} million float32 parameters, {report['num_tensors']} tensors "
            f"with buffers; torch {report['torch']}, {report['threads']} threads on {report['machine']}. "
            f"Medians of {report['rounds']} updates, alternating in one process; below 1 is faster than {PEER}."
        ),
        "",
        "| average | update | median | fastest | ratio of medians |",
        "|---|---|---|---|---|",
    ]
    for mode, seconds in report["seconds"].items():
        peer = median(seconds[PEER])
        lines += [
            f"| {mode} | {name} | {median(values) * 1e3:.1f} ms | {min(values) * 1e3:.1f} ms "
            f"| {median(values) / peer:.2f} |"
            for name, values in seconds.items()
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
