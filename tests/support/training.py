"""Small training runs for tests: submitted, claimed and trained without Ray."""

from __future__ import annotations

import multiprocessing
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import distributed

from services.trainer.context import TrainContext
from services.trainer.loop import TrainOutcome, train
from support.ports import free_port
from wa_core.catalog.runs import RunLog, submit
from wa_core.clock import SystemClock
from wa_core.records import (
    AttemptFailed,
    AttemptStarted,
    AverageRequest,
    CheckpointCommitted,
    CheckpointPolicy,
    RunRequest,
    Scaling,
    TrainingOptions,
)
from wa_core.store.address import address_of, open_address
from wa_core.tensors import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from multiprocessing.process import BaseProcess

    from torch import Tensor

    from wa_core.store.address import StoreAddress
    from wa_core.store.base import ObjectStore

DIGITS = "services.recipes.digits:Digits"
SMALL = {"epochs": 1, "batch_size": 128, "width": 4, "warmup_steps": 2}  # 11 steps


def digits_request(
    *,
    every_steps: int = 4,
    num_workers: int = 1,
    max_failures: int = 2,
    training: TrainingOptions | None = None,
    averages: Mapping[str, str] = MappingProxyType({}),
    **config: object,
) -> RunRequest:
    """A run of the digits recipe that takes about a second."""
    return RunRequest(
        recipe=DIGITS,
        config={**SMALL, **config},
        scaling=Scaling(num_workers=num_workers),
        checkpoint=CheckpointPolicy(every_steps=every_steps),
        training=training or TrainingOptions(),
        averages=[AverageRequest(name=name, rule=rule) for name, rule in averages.items()],
        max_failures=max_failures,
    )


def submit_run(store: ObjectStore, request: RunRequest) -> str:
    """Submit, and return the run id."""
    return submit(store, request, clock=SystemClock()).run_id


def start_attempt(store: ObjectStore, run_id: str, *, resumed_from: int | None = None) -> int:
    """Begin the next attempt, after failing the one before it, and return its number."""
    log = RunLog(store, run_id, clock=SystemClock())
    log.refresh()
    if log.attempt:
        log.append(AttemptFailed(reason="test"))
    return log.append(AttemptStarted(runner_id="test", resumed_from=resumed_from)).attempt


def log_of(store: ObjectStore, run_id: str) -> RunLog:
    """The run's log, read."""
    log = RunLog(store, run_id, clock=SystemClock())
    log.refresh()
    return log


def weights_of(store: ObjectStore, checkpoint: CheckpointCommitted) -> dict[str, Tensor]:
    """A committed checkpoint's tensors."""
    ref = checkpoint.files["model.safetensors"]
    return read_checkpoint(store.stream(ref.key), size_bytes=ref.size_bytes, sha256=ref.sha256).tensors


def differing_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are not bit-identical."""
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def train_with_gloo(store: ObjectStore, run_id: str, *, attempt: int, world_size: int) -> None:
    """Train one attempt with DDP over plain gloo processes."""
    workers = start_gloo_workers(store, run_id, attempt=attempt, world_size=world_size)
    for worker in workers:
        worker.join(240)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert codes == [0] * world_size


def start_gloo_workers(store: ObjectStore, run_id: str, *, attempt: int, world_size: int) -> list[BaseProcess]:
    """Start one attempt's processes; they are forked from one that has imported what they need."""
    port = free_port()
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(
        ["services.trainer.loop", "services.recipes.digits", "services.recipes.char_lm"]
    )
    workers = [
        forking.Process(target=_gloo_worker, args=(address_of(store), run_id, attempt, rank, world_size, port))
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    return list(workers)


def _gloo_worker(
    address: StoreAddress, run_id: str, attempt: int, rank: int, world_size: int, port: int
) -> TrainOutcome:
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        return train(TrainContext(open_address(address), run_id, attempt, rank=rank, world_size=world_size))
    finally:
        distributed.destroy_process_group()
