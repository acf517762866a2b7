"""Learning rates of a run's own schedule, against torch and the paper's equation."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import SWALR

from services.trainer.rates import Rates, is_checkpoint_due
from wa_core.records import ConstantRate, CyclicalRate, LrSchedule, TrainingOptions, WarmupStableRate


def rates_of(schedule: LrSchedule | None, *, num_steps: int, resumed_at: int | None = None) -> list[float]:
    """The rate of each step, from a recipe that starts at 0.1 and decays; saved and loaded before `resumed_at`."""
    optimizer, scheduler, rates = _parts(schedule)
    found = []
    for step in range(num_steps):
        if step == resumed_at:
            saved = [part.state_dict() for part in (optimizer, scheduler, rates)]
            optimizer, scheduler, rates = _parts(schedule)
            for part, state in zip((optimizer, scheduler, rates), saved, strict=True):
                part.load_state_dict(state)
        rates.begin_step(step)
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rates.end_step(step)
    return found


def _parts(schedule: LrSchedule | None) -> tuple[torch.optim.SGD, LambdaLR, Rates]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    return optimizer, scheduler, Rates(schedule, optimizer, scheduler)


@pytest.mark.parametrize("anneal", ["linear", "cosine"])
@pytest.mark.parametrize("anneal_steps", [0, 1, 5])
def test_a_constant_rate_is_annealed_as_swalr_does(anneal: str, anneal_steps: int) -> None:
    """After the recipe's own rates come those of `torch.optim.swa_utils.SWALR`."""
    schedule = ConstantRate.model_validate(
        {"kind": "constant", "lr": 0.02, "start_step": 4, "anneal_steps": anneal_steps, "anneal": anneal}
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1 * 0.9**4)
    oracle = SWALR(
        optimizer, swa_lr=0.02, anneal_epochs=anneal_steps, anneal_strategy={"cosine": "cos"}.get(anneal, anneal)
    )
    expected = []
    for _ in range(8):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        oracle.step()

    found = rates_of(schedule, num_steps=12)

    assert found[:4] == pytest.approx([0.1 * 0.9**step for step in range(4)])
    assert found[4:] == pytest.approx(expected)


def test_cycles_are_those_of_the_paper() -> None:
    """Izmailov et al. 2018, section 3.2: from near lr_max down to lr_min, once in each cycle."""
    schedule = CyclicalRate(kind="cyclical", lr_max=0.5, lr_min=0.1, cycle_steps=4, start_step=2)

    found = rates_of(schedule, num_steps=10)

    assert found[2:] == pytest.approx([0.4, 0.3, 0.2, 0.1] * 2)


def test_checkpoints_are_taken_at_the_ends_of_cycles() -> None:
    """From the first cycle on, the lowest rates are the ones whose weights are kept."""
    schedule = CyclicalRate(kind="cyclical", lr_max=0.5, lr_min=0.1, cycle_steps=4, start_step=6)

    due = [step for step in range(1, 20) if is_checkpoint_due(schedule, step, every_steps=3)]

    assert due == [3, 6, 10, 14, 18]


def test_a_warm_up_is_followed_by_the_optimizers_own_rate() -> None:
    """Warm-up-stable rises to what the optimizer was built with and stays; the recipe's decay has no say."""
    schedule = WarmupStableRate(kind="warmup_stable", warmup_steps=3)

    assert rates_of(schedule, num_steps=6) == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


@pytest.mark.parametrize("resumed_at", range(1, 12))
def test_resumed_rates_are_the_same(resumed_at: int) -> None:
    """F15: wherever a run is resumed, before, within or after the annealing, its rates are bit-identical."""
    schedule = ConstantRate(kind="constant", lr=0.02, start_step=4, anneal_steps=5)

    assert rates_of(schedule, num_steps=12, resumed_at=resumed_at) == rates_of(schedule, num_steps=12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "bf16"),
        ({"accumulate_batches": 0}, "greater than or equal to 1"),
        ({"clip_norm": 0.0}, "greater than 0"),
        ({"evaluate_every_steps": 0}, "greater than or equal to 1"),
        ({"early_stop": {"patience": 3}}, "evaluate_every_steps"),
        ({"early_stop": {"patience": 0}, "evaluate_every_steps": 1}, "greater than or equal to 1"),
        ({"deterministic": 1}, "valid boolean"),
        ({"lr_schedule": {"kind": "sawtooth"}}, "'constant', 'cyclical', 'warmup_stable'"),
        ({"lr_schedule": {"kind": "constant", "lr": 0.0, "start_step": 1}}, "greater than 0"),
        (
            {"lr_schedule": {"kind": "cyclical", "lr_max": 0.1, "lr_min": 0.2, "cycle_steps": 5}},
            "begins at lr_max",
        ),
        (
            {"lr_schedule": {"kind": "cyclical", "lr_max": 0.1, "lr_min": 0.1, "cycle_steps": 0}},
            "than or equal to 1",
        ),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    """Bad inputs 21-26, for training options: refused when they are read, with what would be right."""
    with pytest.raises(ValidationError, match=message):
        TrainingOptions.model_validate(options)
