"""WeightAverage lends its averages to the model, and takes them back bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD

from support.optimizers import (
    assert_same,
    network,
    train,
    weights,
)
from wa_core.errors import InvalidInputError
from wa_core.optimizer import WeightAverage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_swaps_restore_weights_and_averages_bit_for_bit(dtype: torch.dtype) -> None:
    """Not a digit is lost, neither of the weights nor of an average that is wider than they are."""
    model = network(dtype=dtype)
    optimizer = WeightAverage(SGD(model.parameters(), lr=0.05), 0, 1)
    train(model, optimizer, range(9))
    before, kept = weights(model), copy.deepcopy(optimizer.state_dict()["weight_average"])

    optimizer.swap_swa_sgd()
    assert optimizer.is_swapped
    assert not all(torch.equal(one, other) for one, other in zip(weights(model), before, strict=True))
    optimizer.swap_swa_sgd()

    assert_same(weights(model), before)
    found = optimizer.state_dict()["weight_average"]
    assert_same(list(found["averages"].values()), list(kept["averages"].values()))
    assert (found["weights"], found["is_swapped"]) == ({}, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_changed_while_swapped_stays_changed(dtype: torch.dtype) -> None:
    """The exchange is one: averages edited in place are the averages afterwards."""
    param = nn.Parameter(torch.arange(4).to(dtype))
    optimizer = WeightAverage(SGD([param], lr=1.0))
    optimizer.update_swa()
    optimizer.swap_swa_sgd()
    with torch.no_grad():
        param[0] = 9
    optimizer.swap_swa_sgd()
    assert param.tolist() == [0, 1, 2, 3]
    optimizer.swap_swa_sgd()
    assert param.tolist() == [9, 1, 2, 3]


def test_the_context_manager_restores_the_weights_after_an_exception() -> None:
    """Whatever happens in the evaluation, training goes on from its own weights."""
    model = network()
    optimizer = WeightAverage(SGD(model.parameters(), lr=0.05), 0, 1)
    train(model, optimizer, range(4))
    before = weights(model)

    def evaluate() -> None:
        with optimizer.averaged():
            assert not torch.equal(model[0].weight, before[0])
            with pytest.raises(InvalidInputError, match="in place already"), optimizer.averaged():
                pass
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate()

    assert_same(weights(model), before)
    with optimizer.averaged():
        optimizer.swap_swa_sgd()
    assert_same(weights(model), before)


def test_a_warning_that_is_an_error_leaves_nothing_half_done() -> None:
    """Where warnings raise, a swap with missing averages changes nothing, in both forms."""
    model = network()
    optimizer = WeightAverage(SGD(model.parameters(), lr=0.05))
    optimizer.update_swa()
    extra = nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [extra]})
    train(model, optimizer, range(2))
    before = weights(model)
    for _ in range(2):
        with pytest.raises(UserWarning, match="1 of 6 parameters"):
            optimizer.swap_swa_sgd()
        with pytest.raises(UserWarning, match="1 of 6 parameters"), optimizer.averaged():
            pass
        assert_same(weights(model), before)
        assert not optimizer.is_swapped


def test_nothing_is_averaged_while_swapped() -> None:
    """Averaging then would mix averages into weights; it is refused, and before the step that would do it."""
    model = network()
    optimizer = WeightAverage(SGD(model.parameters(), lr=0.05), wa_start=0, wa_freq=2)
    train(model, optimizer, range(3))
    optimizer.swap_swa_sgd()
    before = weights(model)
    for refused in (optimizer.update_swa, lambda: train(model, optimizer, range(1))):
        with pytest.raises(InvalidInputError, match="swapped"):
            refused()
    assert_same(weights(model), before)
    assert optimizer.param_groups[0]["step_counter"] == 3
    optimizer.swap_swa_sgd()
    train(model, optimizer, range(3, 4))
    assert optimizer.param_groups[0]["n_avg"] == 2
