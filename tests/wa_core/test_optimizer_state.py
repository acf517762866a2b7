"""WeightAverage through state dicts, files, processes, copies and pickles."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

from support.optimizers import (
    LAST,
    assert_close,
    assert_same,
    averages,
    make,
    mean,
    network,
    saved,
    train,
    weights,
)
from wa_core.optimizer import WeightAverage

if TYPE_CHECKING:
    from collections.abc import Callable


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mode", ["swa", 0.9])
@pytest.mark.parametrize("inner", ["sgd", "adam", "adam-tensor-rate", "adamw-fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_bit_for_bit_from_a_state_dict(mode: str | float, inner: str, dtype: torch.dtype) -> None:
    """Stop, save, load into new objects and go on: the very bits of a run that never stopped."""
    whole = network(dtype=dtype)
    through = make(whole, mode=mode, inner=inner)
    train(whole, through, range(LAST))

    first = network(dtype=dtype)
    stopped = make(first, mode=mode, inner=inner)
    train(first, stopped, range(17))
    second = network(seed=5, dtype=dtype)
    second.load_state_dict(first.state_dict())
    resumed = make(second, mode=mode, inner=inner)
    resumed.load_state_dict(saved(stopped))
    train(second, resumed, range(17, LAST))

    assert_same(weights(second), weights(whole))
    assert_same(averages(second, resumed), averages(whole, through))
    for name in ("n_avg", "step_counter", "lr"):
        assert [g[name] for g in resumed.param_groups] == [g[name] for g in through.param_groups]


RESUME = """
import sys
sys.path.insert(1, "tests")
import torch
from support.optimizers import averages, make, network, train, weights
kept = torch.load(sys.argv[1] + "/kept.pt", weights_only=True)
model = network(seed=77)
model.load_state_dict(kept["model"])
optimizer = make(model, mode=0.9, inner="adam")
optimizer.load_state_dict(kept["optimizer"])
train(model, optimizer, range(17, 40))
torch.save([weights(model), averages(model, optimizer)], sys.argv[1] + "/found.pt")
"""


def test_a_new_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Nothing in the state is an address in memory: another process loads it and ends with the same bits."""
    model = network()
    optimizer = make(model, mode=0.9, inner="adam")
    train(model, optimizer, range(17))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "kept.pt")
    train(model, optimizer, range(17, LAST))

    subprocess.run([sys.executable, "-c", RESUME, str(tmp_path)], check=True, timeout=120, cwd=ROOT)

    final, average = torch.load(tmp_path / "found.pt", weights_only=True)
    assert_same(final, weights(model))
    assert_same(average, averages(model, optimizer))


def test_the_state_dict_is_keyed_by_parameter_index() -> None:
    """Indices are the inner optimizer's own, from 0 in the order of the groups, and never an id()."""
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(5))
    state = optimizer.state_dict()
    indices = [index for group in state["param_groups"] for index in group["params"]]
    assert indices == list(range(5))
    assert list(state["weight_average"]["averages"]) == indices
    assert set(state["state"]) == set(indices)
    plain = network()
    SGD(plain.parameters(), lr=0.1, momentum=0.9).load_state_dict(
        {**state, "param_groups": [{**state["param_groups"][0], "params": indices}]}
    )


def test_a_loaded_average_shares_no_memory_with_the_state_dict() -> None:
    """Going on after load_state_dict leaves the loaded tensors alone."""
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(6))
    state = saved(optimizer)
    before = copy.deepcopy(state["weight_average"]["averages"])
    optimizer.load_state_dict(state)
    train(model, optimizer, range(6, 12))
    optimizer.swap_swa_sgd()
    assert_same(list(state["weight_average"]["averages"].values()), list(before.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_saved_while_swapped_swaps_back_after_loading(dtype: torch.dtype) -> None:
    """Saving in the middle of an evaluation loses neither the weights nor a digit of the averages."""
    model = network(dtype=dtype)
    optimizer = make(model)
    train(model, optimizer, range(9))
    expected = weights(model), averages(model, optimizer)

    with optimizer.averaged():
        state, kept = saved(optimizer), copy.deepcopy(model.state_dict())
    other = network(seed=3, dtype=dtype)
    other.load_state_dict(kept)
    resumed = make(other)
    resumed.load_state_dict(state)

    assert resumed.is_swapped
    assert_same(weights(other), expected[1])
    resumed.swap_swa_sgd()
    assert_same(weights(other), expected[0])
    assert_same(averages(other, resumed), expected[1])


def test_the_state_of_a_plain_optimizer_starts_an_average_from_zero() -> None:
    """A run that did not average before may begin to; the inner state goes on."""
    model = network()
    plain = SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, plain, range(4))
    optimizer = WeightAverage(SGD(model.parameters(), lr=0.5, momentum=0.9), 0, 1)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.05
    seen = train(model, optimizer, range(4, 8))
    assert_close(averages(model, optimizer), mean(seen))


def test_a_state_dict_that_does_not_fit_is_refused_whole() -> None:
    """Another mode, format, number of groups or shape raises a ValueError, and nothing has changed."""
    model = network()
    optimizer = make(model)
    train(model, optimizer, range(8))
    expected = averages(model, optimizer)
    state = saved(optimizer)
    average = state["weight_average"]
    groups = state["param_groups"]
    bad: list[tuple[dict[str, Any], str]] = [
        ({**state, "weight_average": {**average, "mode": 0.5}}, "mode=0.5"),
        ({**state, "weight_average": {**average, "format": 2}}, "unknown format"),
        ({**state, "weight_average": []}, "unknown format"),
        (
            {**state, "weight_average": {**average, "averages": {0: torch.ones(1)}}},
            r"parameter 0 has shape \(1,\)",
        ),
        ({**state, "weight_average": {**average, "averages": {9: torch.ones(1)}}}, "no such parameter"),
        ({name: value for name, value in state.items() if name != "weight_average"}, "holds none"),
        ({**state, "param_groups": groups[:1]}, "different number of parameter groups"),
    ]
    for wrong, says in bad:
        with pytest.raises(ValueError, match=says):
            optimizer.load_state_dict(wrong)
    assert_same(averages(model, optimizer), expected)
    assert [group["n_avg"] for group in optimizer.param_groups] == [3, 3]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])  # noqa: S301
def test_copies_and_pickles_go_on_alone(copier: Callable[[Any], Any]) -> None:
    """A copy of model and optimizer together trains on to the same bits and shares nothing with the original."""
    model = network()
    optimizer = make(model)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(model, optimizer, range(9))

    other, twin = copier((model, optimizer))
    before = averages(model, optimizer)
    train(other, twin, range(9, 15))

    assert twin.param_groups is twin.optimizer.param_groups
    assert_same(averages(model, optimizer), before)
    train(model, optimizer, range(9, 15))
    assert_same(averages(other, twin), averages(model, optimizer))


def test_a_model_that_changes_its_dtype_keeps_its_average() -> None:
    """After model.bfloat16() and back to double, averages follow without losing what they held."""
    param = nn.Parameter(torch.ones(3))
    optimizer = WeightAverage(SGD([param], lr=1.0))
    optimizer.update_swa()
    for dtype, value in ((torch.bfloat16, 2.0), (torch.float64, 6.0)):
        param.data = torch.full((3,), value, dtype=dtype)
        optimizer.update_swa()
    optimizer.swap_swa_sgd()
    assert (param.tolist(), param.dtype) == ([3.0] * 3, torch.float64)


@settings(max_examples=50, deadline=None)
@given(
    start=st.integers(0, 12),
    freq=st.integers(1, 5),
    mode=st.one_of(st.just("swa"), st.floats(0, 0.999)),
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), min_size=4, max_size=4),
    stop=st.integers(0, 20),
)
def test_any_schedule_shape_and_restart_equals_brute_force(
    start: int, freq: int, mode: str | float, sizes: list[int], dtypes: list[torch.dtype], stop: int
) -> None:
    """Averages of random walks, with a restart somewhere, equal the float64 sum of their weights."""
    draw = torch.Generator().manual_seed(start * 100 + freq)
    params = [nn.Parameter(torch.zeros(size, dtype=kind)) for size, kind in zip(sizes, dtypes, strict=False)]
    optimizer = WeightAverage(SGD([{"params": [param]} for param in params], lr=1.0), start, freq, mode=mode)
    chosen: list[list[Tensor]] = []
    for step in range(1, 21):
        for param in params:
            param.grad = torch.randn(param.shape, generator=draw).to(param)
        optimizer.step()
        if step > start and step % freq == 0:
            chosen.append([param.detach().double().clone() for param in params])
        if step == stop:
            state = saved(optimizer)
            optimizer = WeightAverage(
                SGD([{"params": [param]} for param in params], lr=1.0), start, freq, mode=mode
            )
            optimizer.load_state_dict(state)
    found = optimizer.state_dict()["weight_average"]["averages"]
    assert [group["n_avg"] for group in optimizer.param_groups] == [len(chosen)] * len(params)
    if chosen:
        assert_close([found[index] for index in range(len(params))], mean(chosen, mode=mode), 5e-6)
