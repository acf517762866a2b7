"""WeightAverage among torch's own: schedulers, scalers, hooks, closures, update_bn and DDP."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.swa_utils import update_bn

from support.optimizers import (
    INNER,
    LAST,
    assert_close,
    assert_same,
    averages,
    mean,
    network,
    train,
    weights,
)
from wa_core.batchnorm import recalibrate
from wa_core.optimizer import WeightAverage

if TYPE_CHECKING:
    from collections.abc import Callable


ROOT = Path(__file__).parents[2]


def test_groups_state_and_defaults_are_the_inner_optimizers() -> None:
    """Whoever holds the inner optimizer sees the same objects, also after loading a state dict."""
    model = network()
    inner = SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = WeightAverage(inner, 0, 1)
    train(model, optimizer, range(2))
    for _ in range(2):
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert optimizer.param_groups is inner.param_groups
        assert optimizer.state is inner.state
        assert optimizer.defaults is inner.defaults
        assert set(inner.state[model[0].weight]) == {"momentum_buffer"}
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for attribute in ("param_groups", "state", "defaults"):
        setattr(optimizer, attribute, getattr(optimizer, attribute))
    assert "n_avg: 2" in repr(optimizer)


def test_groups_changed_behind_the_wrapper_are_taken_as_they_are() -> None:
    """A group added to, or a state loaded into, the inner optimizer itself counts from zero."""
    model, late = network(), nn.Parameter(torch.ones(2))
    inner = SGD(model.parameters(), lr=0.05)
    optimizer = WeightAverage(inner, 0, 1)
    plain = copy.deepcopy(inner.state_dict())
    for group in plain["param_groups"]:
        del group["n_avg"], group["step_counter"]
    inner.load_state_dict(plain)
    inner.add_param_group({"params": [late]})
    train(model, optimizer, range(2))
    assert [(group["n_avg"], group["step_counter"]) for group in inner.param_groups] == [(2, 2), (2, 2)]


def test_a_closure_is_evaluated_by_the_inner_optimizer_and_its_loss_returned() -> None:
    """step(closure) trains like step() after a backward pass, and LBFGS may call it as often as it likes."""
    model, other = network(), network()
    optimizer = WeightAverage(SGD(model.parameters(), lr=0.05), 1, 2)
    without = WeightAverage(SGD(other.parameters(), lr=0.05), 1, 2)
    train(model, optimizer, range(6), closure=True)
    train(other, without, range(6))
    assert_same(averages(model, optimizer), averages(other, without))

    x = nn.Parameter(torch.tensor([5.0]))
    lbfgs = WeightAverage(torch.optim.LBFGS([x], max_iter=5), 0, 1)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = (x - 1).square().sum()
        loss.backward()
        return loss.detach()

    assert lbfgs.step(closure) == 16.0  # type: ignore[arg-type]
    assert lbfgs.param_groups[0]["n_avg"] == 1


def test_optimizer_hooks_run_on_the_wrapper() -> None:
    """Step, state-dict and load-state-dict hooks are called as torch promises, and may replace what they get."""
    model, calls = network(), []
    optimizer = WeightAverage(SGD(model.parameters(), lr=0.05), 0, 1)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append(("before", opt)))
    optimizer.register_step_post_hook(
        lambda opt, args, kwargs: calls.append(("after", opt.param_groups[0]["n_avg"]))
    )
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append(("pack", opt)))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "note": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda opt, state: {key: value for key, value in state.items() if key != "note"}
    )
    optimizer.register_load_state_dict_post_hook(lambda opt: calls.append(("loaded", opt)))

    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)

    assert calls == [("before", optimizer), ("after", 1), ("pack", optimizer), ("loaded", optimizer)]
    assert (state["note"], "averages" in state["weight_average"]) == (1, True)


def test_zero_grad_is_the_inner_optimizers() -> None:
    """zero_grad clears gradients, to None or to zeros."""
    model = network()
    optimizer = WeightAverage(SGD(model.parameters(), lr=0.05))
    model(torch.ones(1, 5)).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(param.grad is not None and not param.grad.any() for param in model.parameters())
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 3),
    "one-cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=LAST),
    "swalr": lambda opt: torch.optim.swa_utils.SWALR(opt, swa_lr=0.01, anneal_epochs=5),
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, LAST),
    "sequential": lambda opt: torch.optim.lr_scheduler.SequentialLR(
        opt,
        [torch.optim.lr_scheduler.LinearLR(opt), torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)],
        milestones=[4],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("target", ["wrapper", "inner"])
def test_schedulers_drive_it_without_warnings(name: str, target: str) -> None:
    """A scheduler on the wrapper or on the inner optimizer gives the rates it gives a plain optimizer."""
    model, plain_model = network(), network()
    inner = SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = WeightAverage(inner, 4, 2)
    scheduler = SCHEDULERS[name](optimizer if target == "wrapper" else inner)
    plain = SGD(plain_model.parameters(), lr=0.05, momentum=0.9)
    reference = SCHEDULERS[name](plain)
    for step in range(LAST - 1):
        train(model, optimizer, range(step, step + 1))
        train(plain_model, plain, range(step, step + 1))
        scheduler.step()
        reference.step()
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert_same(weights(model), weights(plain_model))
    assert optimizer.param_groups[0]["step_counter"] == LAST - 1


def test_reduce_on_plateau_lowers_the_rate() -> None:
    """ReduceLROnPlateau works on the wrapper as well."""
    optimizer = WeightAverage(SGD(network().parameters(), lr=0.5))
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for loss in (1.0, 2.0):
        scheduler.step(loss)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize("inner", ["sgd", "adamw-fused"])
def test_steps_that_a_grad_scaler_skips_do_not_count(inner: str) -> None:
    """Infinite gradients skip the step: no counter moves and no average is taken, with fused optimizers, too."""
    model = network()
    optimizer = WeightAverage(INNER[inner](model.parameters()), wa_start=0, wa_freq=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
    seen = []
    for step in range(6):
        optimizer.zero_grad()
        loss = model(torch.ones(2, 5)).square().mean() * (math.inf if step in (1, 4) else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        before = weights(model)
        scaler.step(optimizer)
        scaler.update()
        if step in (1, 4):
            assert_same(weights(model), before)
        else:
            seen.append([param.detach().double().clone() for param in model.parameters()])
    group = optimizer.param_groups[0]
    assert (group["n_avg"], group["step_counter"], scaler.get_scale()) == (4, 4, 16.0)
    assert_close(averages(model, optimizer), mean(seen))


@pytest.mark.parametrize("as_tuple", [False, True])
def test_bn_update_equals_torchs_update_bn(*, as_tuple: bool) -> None:
    """The static bn_update gives the statistics of torch.optim.swa_utils.update_bn, modes and momenta restored."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, momentum=0.3), nn.Dropout(0.0)).eval()
    reference = copy.deepcopy(model)
    batches: list[Any] = [torch.randn(size, 5) * 3 + 1 for size in (16, 16, 7)]
    if as_tuple:
        batches = [(batch, torch.zeros(len(batch))) for batch in batches]
    update_bn(batches, reference, device=torch.device("cpu"))

    report = WeightAverage.bn_update(batches, model, device="cpu")

    assert (report.num_batches, report.num_layers) == (3, 1)
    assert torch.allclose(model[1].running_mean, reference[1].running_mean, rtol=1e-6, atol=1e-7)
    assert torch.allclose(model[1].running_var, reference[1].running_var, rtol=1e-6)
    assert (model.training, model[1].momentum) == (False, 0.3)
    exact = copy.deepcopy(model)
    recalibrate(exact, batches)
    assert not torch.allclose(exact[1].running_var, model[1].running_var, rtol=1e-4)


DDP = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from wa_core.optimizer import WeightAverage

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
torch.manual_seed(rank)
model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
optimizer = WeightAverage(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 3, 2, 0.05)
seen = []
for step in range(12):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    if step + 1 > 3 and (step + 1) % 2 == 0:
        seen.append([param.detach().double().clone() for param in model.parameters()])
optimizer.swap_swa_sgd()
expected = [torch.stack(values).mean(0) for values in zip(*seen)]
torch.save([[p.detach() for p in model.parameters()], expected], f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_ddp_ranks_hold_identical_averages(tmp_path: Path) -> None:
    """Two gloo processes with data of their own end with the same averages, which are those of brute force."""
    command = [sys.executable, "-c", DDP]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=ROOT) for rank in (0, 1)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    (first, expected), (second, _) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(first, second)
    assert_close(first, expected)


def test_the_guides_code_runs_as_it_stands(tmp_path: Path) -> None:
    """Every Python block of the guide runs, in order, in one program without warnings."""
    text = (ROOT / "docs" / "guides" / "optimizer.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) == 3
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-c", "\n".join(blocks)]
    subprocess.run(command, check=True, timeout=120, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
