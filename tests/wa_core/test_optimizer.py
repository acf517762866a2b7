"""WeightAverage's averages against float64 brute force, torch.optim.swa_utils and the rules it states."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from support.optimizers import (
    INNER,
    LAST,
    MODES,
    assert_close,
    assert_same,
    averages,
    mean,
    network,
    train,
    weights,
)
from wa_core.errors import InvalidInputError
from wa_core.optimizer import WeightAverage


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("mode", MODES)
def test_automatic_averages_equal_brute_force_with_any_inner_optimizer(inner: str, mode: str | float) -> None:
    """Steps after wa_start at multiples of wa_freq are averaged, and training is that of the inner optimizer."""
    model, plain = network(), network()
    optimizer = WeightAverage(INNER[inner](model.parameters()), wa_start=5, wa_freq=3, mode=mode)

    seen = train(model, optimizer, range(LAST))

    assert_same(
        weights(model), [t.float() for t in train(plain, INNER[inner](plain.parameters()), range(LAST))[-1]]
    )
    chosen = [seen[step - 1] for step in range(1, LAST + 1) if step > 5 and step % 3 == 0]
    assert_close(averages(model, optimizer), mean(chosen, mode=mode))
    assert [group["n_avg"] for group in optimizer.param_groups] == [len(chosen)]
    assert [group["step_counter"] for group in optimizer.param_groups] == [LAST]


@pytest.mark.parametrize(
    ("start", "freq", "expected"),
    [
        (0, 1, [1, 2, 3, 4, 5, 6, 7]),
        (0, 3, [3, 6]),
        (3, 3, [6]),
        (2, 3, [3, 6]),
        (4, 2, [6]),
        (7, 1, []),
        (5, 1, [6, 7]),
    ],
)
def test_the_steps_that_count_are_exactly_those_of_the_rule(start: int, freq: int, expected: list[int]) -> None:
    """With a one-hot weight per step the average shows which steps count: multiples of freq after start."""
    param = nn.Parameter(torch.zeros(8))
    optimizer = WeightAverage(SGD([param], lr=1.0), start, freq)
    for step in range(1, 8):
        # With a learning rate of 1 this moves the parameter to the unit vector of the step.
        param.grad = param.detach() - nn.functional.one_hot(torch.tensor(step), 8).float()
        optimizer.step()

    if not expected:
        assert optimizer.param_groups[0]["n_avg"] == 0
        return
    optimizer.swap_swa_sgd()
    assert torch.nonzero(param.detach()).flatten().tolist() == expected
    assert param.detach()[expected].tolist() == pytest.approx([1 / len(expected)] * len(expected))


def test_the_learning_rate_is_set_before_a_step_once_the_counter_reaches_start() -> None:
    """The step that begins with counter == wa_start is the first with wa_lr; earlier ones keep their own rate."""
    param = nn.Parameter(torch.zeros(1))
    optimizer = WeightAverage(SGD([param], lr=1.0), wa_start=3, wa_freq=2, wa_lr=0.25)
    moved, rates = [], []
    for _ in range(6):
        before = param.item()
        param.grad = torch.ones(1)
        optimizer.step()
        moved.append(before - param.item())
        rates.append(optimizer.param_groups[0]["lr"])
    assert moved == rates == [1.0, 1.0, 1.0, 0.25, 0.25, 0.25]


def test_a_learning_rate_in_a_tensor_stays_that_tensor() -> None:
    """A rate given as a tensor is written in place, so that whoever holds it sees the change."""
    rate, model = torch.tensor(0.01), network()
    optimizer = WeightAverage(Adam(model.parameters(), lr=rate), 0, 1, 0.5)
    train(model, optimizer, range(1))
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


def test_without_wa_lr_the_learning_rate_is_left_alone() -> None:
    """wa_lr=None averages without touching the rate."""
    model = network()
    optimizer = WeightAverage(SGD(model.parameters(), lr=0.125), wa_start=0, wa_freq=1)
    train(model, optimizer, range(3))
    assert optimizer.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("mode", [*MODES, 0.999])
def test_manual_mode_averages_when_told_and_counts_all_steps(mode: str | float) -> None:
    """update_swa takes the weights as they are; step alone never averages."""
    model = network()
    optimizer = WeightAverage(SGD(model.parameters(), lr=0.05, momentum=0.9), mode=mode)
    assert not optimizer.is_automatic
    chosen = []
    for step in range(30):
        seen = train(model, optimizer, range(step, step + 1))
        if step % 4 == 1:
            optimizer.update_swa()
            chosen += seen
    group = optimizer.param_groups[0]
    assert (group["n_avg"], group["step_counter"]) == (len(chosen), 30)
    assert_close(averages(model, optimizer), mean(chosen, mode=mode))


def test_one_group_can_be_averaged_alone() -> None:
    """update_swa_group leaves the other groups and their counters alone; their parameters warn and stay."""
    x, y = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = WeightAverage(SGD([{"params": [x]}, {"params": [y], "lr": 0.1}], lr=0.5))
    for value in (2.0, 4.0):
        with torch.no_grad():
            y.fill_(value)
        optimizer.update_swa_group(optimizer.param_groups[1])
    assert [group["n_avg"] for group in optimizer.param_groups] == [0, 2]

    with pytest.warns(UserWarning, match=r"1 of 2 parameters have no average yet.*indices 0\)"):
        optimizer.swap_swa_sgd()

    assert (x.tolist(), y.tolist()) == ([1.0, 1.0], [3.0, 3.0])
    with pytest.warns(UserWarning, match="no average"):
        optimizer.swap_swa_sgd()
    assert (x.tolist(), y.tolist()) == ([1.0, 1.0], [4.0, 4.0])
    assert not optimizer.is_swapped


def test_a_group_of_somebody_else_is_refused() -> None:
    """A dict that is not one of param_groups would be counted in vain, so it raises."""
    optimizer = WeightAverage(SGD(network().parameters(), lr=0.1))
    with pytest.raises(InvalidInputError, match="none of the optimizer's param_groups"):
        optimizer.update_swa_group(dict(optimizer.param_groups[0]))


def test_a_group_added_during_the_run_starts_from_its_own_zero() -> None:
    """Its averages begin wa_start steps after it was added, whatever the other groups count."""
    first, second = network(), network(seed=1)
    optimizer = WeightAverage(SGD(first.parameters(), lr=0.05), 5, 2, 0.01)
    seen = train(first, optimizer, range(11))
    later: dict[str, Any] = {"params": list(second.parameters()), "lr": 0.5, "n_avg": 9}
    optimizer.add_param_group(later)
    assert optimizer.param_groups[1] is later
    assert (later["n_avg"], later["step_counter"]) == (0, 0)

    both = []
    for step in range(11, 20):
        for param in first.parameters():
            param.grad = torch.ones_like(param)
        both += train(second, optimizer, range(step, step + 1))
        seen.append([param.detach().double().clone() for param in first.parameters()])
        assert later["lr"] == (0.5 if step - 10 <= 5 else 0.01)

    assert [group["step_counter"] for group in optimizer.param_groups] == [20, 9]
    optimizer.swap_swa_sgd()
    assert_close(weights(first), mean([seen[step - 1] for step in range(6, 21, 2)]))
    assert_close(weights(second), mean([both[step - 1] for step in (6, 8)]))


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.9999])
def test_the_ema_is_unbiased_from_the_first_update_on(decay: float) -> None:
    """The coefficients are decay ** age over their sum: neither zero nor the first value is preferred."""
    param = nn.Parameter(torch.zeros(12, dtype=torch.float64))
    optimizer = WeightAverage(SGD([param], lr=1.0), mode=decay)
    for n in range(12):
        with torch.no_grad():
            param.zero_()[n] = 1.0
        optimizer.update_swa()
        optimizer.swap_swa_sgd()
        coefficients = [decay**age for age in reversed(range(n + 1))]
        expected = [value / math.fsum(coefficients) for value in coefficients]
        assert param.tolist()[: n + 1] == pytest.approx(expected, rel=1e-12)
        optimizer.swap_swa_sgd()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_constants_stay_exactly_constant(mode: str | float, dtype: torch.dtype) -> None:
    """Weights that never change have themselves as their average, bit for bit, after every update."""
    param = nn.Parameter(torch.randn(1000).to(dtype))
    before = param.detach().clone()
    optimizer = WeightAverage(SGD([param], lr=1.0), mode=mode)
    for _ in range(20):
        optimizer.update_swa()
        optimizer.swap_swa_sgd()
        assert torch.equal(param, before)
        optimizer.swap_swa_sgd()


@pytest.mark.parametrize("mode", ["swa", 0.9])
def test_averages_equal_those_of_averaged_model(mode: str | float) -> None:
    """The running mean is that of torch.optim.swa_utils; so is the EMA after its bias has died away."""
    model = network()
    function = get_swa_multi_avg_fn() if mode == "swa" else get_ema_multi_avg_fn(float(mode))
    reference = AveragedModel(model, multi_avg_fn=function)
    optimizer = WeightAverage(SGD(model.parameters(), lr=0.05), 0, 1, mode=mode)
    for step in range(300):
        train(model, optimizer, range(step, step + 1))
        reference.update_parameters(model)
    assert_close(averages(model, optimizer), weights(reference.module), 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["swa", 0.999])
def test_low_precision_weights_are_averaged_in_float32(dtype: torch.dtype, mode: str | float) -> None:
    """2,000 small moves add up; an average in the weights' own precision would be stuck."""
    param = nn.Parameter(torch.zeros(4).to(dtype))
    optimizer = WeightAverage(SGD([param], lr=1.0), mode=mode)
    optimizer.update_swa()
    with torch.no_grad():
        param.fill_(1)
    for _ in range(1999):
        optimizer.update_swa()
    exact = 1 - (1 / 2000 if mode == "swa" else 0.999**1999 * 0.001 / (1 - 0.999**2000))
    assert [tensor.dtype for tensor in optimizer.state_dict()["weight_average"]["averages"].values()] == [
        torch.float32
    ]
    assert optimizer.state_dict()["weight_average"]["averages"][0][0].item() == pytest.approx(exact, abs=1e-5)
    optimizer.swap_swa_sgd()
    assert torch.equal(param, torch.full((4,), exact).to(dtype))


def test_float64_weights_are_averaged_in_float64() -> None:
    """Nothing is narrowed: values beyond float32's range average all right."""
    param = nn.Parameter(torch.tensor([1e300], dtype=torch.float64))
    optimizer = WeightAverage(SGD([param], lr=1.0))
    optimizer.update_swa()
    with torch.no_grad():
        param.fill_(3e300)
    optimizer.update_swa()
    optimizer.swap_swa_sgd()
    assert param.item() == 2e300


def test_a_model_of_many_dtypes_keeps_each() -> None:
    """Groups of device and dtype are blended apart; integers take the latest value."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
    params = [nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes]
    params += [nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)]
    optimizer = WeightAverage(SGD(params, lr=1.0))
    for value in (1, 2, 6):
        with torch.no_grad():
            for param in params:
                param.fill_(value)
        optimizer.update_swa()
    optimizer.swap_swa_sgd()
    assert [param.tolist() for param in params] == [[3] * 3] * 6 + [[6] * 3]
    assert [param.dtype for param in params] == [*dtypes, torch.int64]


def test_frozen_parameters_and_those_without_gradients_are_averaged() -> None:
    """A parameter that does not move has itself as its average; one thawed later is averaged from the start."""
    model = network()
    model[0].weight.requires_grad_(requires_grad=False)
    optimizer = WeightAverage(SGD(model.parameters(), lr=0.05), 0, 1)
    seen = train(model, optimizer, range(5))
    frozen = model[0].weight.detach().clone()
    assert torch.equal(averages(model, optimizer)[0], frozen)
    model[0].weight.requires_grad_(requires_grad=True)
    seen += train(model, optimizer, range(5, 9))
    assert_close(averages(model, optimizer), mean(seen))


def test_a_parameter_that_joins_its_group_late_starts_as_its_own_average() -> None:
    """A parameter appended to a group by hand never has a part of zero in its average."""
    first, late = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.full((1,), 8.0))
    optimizer = WeightAverage(SGD([first], lr=1.0))
    optimizer.update_swa()
    optimizer.param_groups[0]["params"].append(late)
    optimizer.update_swa()
    assert torch.equal(optimizer.state_dict()["weight_average"]["averages"][1], late.detach())


class Tied(nn.Module):
    """The output layer is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("kind", ["module", "twice in a group", "two over one memory"])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_tied_parameters_are_averaged_and_swapped_once(kind: str) -> None:
    """A parameter under two names, or two parameters over one memory, are exchanged once, not twice."""
    model = Tied()
    weight = model.embedding.weight
    params: dict[str, list[nn.Parameter]] = {
        "module": list(model.parameters()),
        "twice in a group": [weight, model.head.weight],
        "two over one memory": [weight, nn.Parameter(weight.data)],
    }
    optimizer = WeightAverage(SGD(params[kind], lr=0.0))
    values = []
    for _ in range(3):
        with torch.no_grad():
            weight.normal_()
        values.append(weight.detach().double().clone())
        optimizer.update_swa()
    assert optimizer.param_groups[0]["n_avg"] == 3

    optimizer.swap_swa_sgd()
    assert torch.allclose(model.head.weight.double(), torch.stack(values).mean(0), atol=1e-6)
    optimizer.swap_swa_sgd()
    assert torch.equal(model.head.weight.double(), values[-1])
