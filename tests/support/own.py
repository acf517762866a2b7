"""Training loops of one's own, for tests: a small problem, what was offered, and the average that comes of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import nn

from services.averager.assessor import ProcessAssessor
from support.averaging import averager, exact_mean, served_weights
from support.training import log_of, weights_of
from wa_core.records import RunState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from wa_core.store.base import ObjectStore


def small_model() -> nn.Sequential:
    """A model with BatchNorm for inputs of 8 numbers and 3 classes."""
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def batches(num_batches: int, *, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Labelled points of three clouds, the same ones every time."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 8, generator=draw)
    labels = [torch.randint(3, (size,), generator=draw) for _ in range(num_batches)]
    return [(centres[label] + 0.5 * torch.randn(size, 8, generator=draw), label) for label in labels]


def average_to_end(store: ObjectStore, run_id: str, *, limit_s: float = 240) -> None:
    """Let a real averager, with a real assessor, work until the run has succeeded."""
    with ProcessAssessor() as assessor:
        worker = averager(store, assessor=assessor, assess_interval_s=0.0)
        deadline = time.monotonic() + limit_s
        while log_of(store, run_id).state is not RunState.SUCCEEDED:
            assert time.monotonic() < deadline, log_of(store, run_id).state
            worker.tick()


def assert_is_mean_of_checkpoints(
    store: ObjectStore, run_id: str, average: str, *, steps: Sequence[int], parameters: Sequence[str]
) -> dict[str, Tensor]:
    """What would be downloaded is the mean, in float64, of what was committed at `steps`; returns it."""
    entries = [entry for entry in log_of(store, run_id).lineage if entry.step in steps]
    assert [entry.step for entry in entries] == list(steps)
    served = served_weights(store, run_id, average)
    expected = exact_mean([weights_of(store, entry) for entry in entries])
    assert set(parameters) <= set(served)
    for name in parameters:
        torch.testing.assert_close(served[name], expected[name].to(served[name].dtype), rtol=1e-6, atol=1e-7)
    return served
