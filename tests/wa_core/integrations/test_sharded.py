"""Weights that are sharded by FSDP2, gathered and published by two real processes."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from support.own import assert_is_mean_of_checkpoints, average_to_end, batches
from support.ports import free_port
from support.training import log_of, weights_of
from wa_core import register_run
from wa_core.errors import InvalidInputError
from wa_core.integrations.sharded import full_state_dict
from wa_core.publisher import CheckpointPublisher
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from pathlib import Path

WORLD_SIZE, STEPS = 2, 4


def plain_model() -> nn.Sequential:
    """A model whose tensors do not divide evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


def train_sharded(folder: Path, rank: int, port: int) -> None:
    """One rank of an FSDP2 training that offers every step."""
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD_SIZE)
    try:
        torch.set_num_threads(1)
        mesh = distributed.init_device_mesh("cpu", (WORLD_SIZE,))
        model = plain_model()
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = register_run(LocalStore(folder), averages={"swa": "swa"}) if rank == 0 else None
        for step, (inputs, labels) in enumerate(batches(STEPS), 1):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            state = full_state_dict(model)
            assert bool(state) == (rank == 0)
            if run is not None:
                run.offer(step, state)
        if run is not None:
            run.finish()
            (folder / "run_id").write_text(run.run_id)
            _refuses_a_shard(LocalStore(folder), run.run_id, model)
    finally:
        distributed.destroy_process_group()


def _refuses_a_shard(store: LocalStore, run_id: str, model: nn.Module) -> None:
    publisher = CheckpointPublisher(store, run_id)
    with pytest.raises(InvalidInputError, match=r"only a part of it; gather .*full_state_dict"):
        publisher.offer(9, model)
    publisher.close()


def test_two_sharded_processes_end_in_an_average(tmp_path: Path) -> None:
    """Whole tensors arrive, equal to those of one unsharded process; the mean is there to be downloaded."""
    spawning, port = multiprocessing.get_context("spawn"), free_port()
    workers = [spawning.Process(target=train_sharded, args=(tmp_path, rank, port)) for rank in range(WORLD_SIZE)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert codes == [0, 0]

    store, run_id = LocalStore(tmp_path), (tmp_path / "run_id").read_text()
    model = plain_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for entry, (inputs, labels) in zip(log_of(store, run_id).lineage, batches(STEPS), strict=True):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        torch.testing.assert_close(weights_of(store, entry), dict(model.state_dict()), rtol=1e-5, atol=1e-6)
    average_to_end(store, run_id)
    names = list(model.state_dict())
    assert_is_mean_of_checkpoints(store, run_id, "swa", steps=[1, 2, 3, 4], parameters=names)


def test_without_sharding_it_is_the_state_dict() -> None:
    """One process, or a module that is not sharded, gives what `state_dict` gives, not copied."""
    model = plain_model()

    state = full_state_dict(model)

    assert all(state[name].data_ptr() == tensor.data_ptr() for name, tensor in model.state_dict().items())
