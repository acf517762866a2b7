"""The one-hot trick: every rule's closed-form profile, checked on real tensors and real files.

When the weights of the t-th checkpoint are the unit vector e_t, their average *is* the coefficient vector.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wa_core.averaging.files.offline import average_files
from wa_core.averaging.rules import EmaRule, PowerEmaRule, Rule, SwaRule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.averaging.windows import WindowRule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SCHEDULES = {
    "every step": list(range(1, 61)),
    "every 10": list(range(10, 610, 10)),
    "every 100": list(range(100, 6100, 100)),
    "irregular": [3, 4, 9, 40, 41, 100, 137, 500, 501, 777, 1000, 1001, 5000],
}


def mean(steps: list[int]) -> list[float]:
    """SWA: 1 / n."""
    return [1 / len(steps)] * len(steps)


def half_life(steps: list[int]) -> list[float]:
    """The part of 2**(-age / 60), over the whole run, that falls on the steps that each checkpoint stands for."""
    marks = [2 ** ((step - steps[-1]) / 60) for step in [0, *steps]]
    return [(after - before) / (1 - marks[0]) for before, after in pairwise(marks)]


def half_life_from_the_first(steps: list[int]) -> list[float]:
    """The first checkpoint keeps all the weight that the decay has left it."""
    marks = [0.0, *(2 ** ((step - steps[-1]) / 60) for step in steps)]
    return [after - before for before, after in pairwise(marks)]


def decay_per_fold(steps: list[int]) -> list[float]:
    """(1 - d) d**age / (1 - d**n)."""
    n = len(steps)
    return [0.1 * 0.9**age / (1 - 0.9**n) for age in reversed(range(n))]


def decay_from_the_first(steps: list[int]) -> list[float]:
    """As torch.optim.swa_utils: d**(n - 1) for the first."""
    n = len(steps)
    return [0.9 ** (n - 1), *(0.1 * 0.9**age for age in reversed(range(n - 1)))]


def warmed_up(steps: list[int]) -> list[float]:
    """Decays min(0.9, (1 + n) / (10 + n)) from a zero start, over the mass gathered."""
    decays = [min(0.9, (1 + n) / (10 + n)) for n in range(len(steps))]
    raw = [(1 - decay) * math.prod(decays[n + 1 :]) for n, decay in enumerate(decays)]
    return [value / (1 - math.prod(decays)) for value in raw]


def ramped_up(steps: list[int]) -> list[float]:
    """A power of the step until step 60 / 0.1, where the half-life has grown to 60, and a half-life from there."""

    def left(step: int) -> float:
        ramp = (min(step, 600) / 600) ** (math.log(2) / 0.1)
        return ramp * 2 ** (max(step - 600, 0) / 60)

    return [(left(after) - left(before)) / left(steps[-1]) for before, after in pairwise([0, *steps])]


def power(steps: list[int]) -> list[float]:
    """The part of t**gamma, with gamma for sigma_rel = 0.1 from the paper's cubic (Algorithm 2)."""
    gamma = np.roots([1, 7, 16 - 100, 12 - 100]).real.max()
    marks = [(step / steps[-1]) ** (gamma + 1) for step in [0, *steps]]
    return [after - before for before, after in pairwise(marks)]


def decayed(decay: Callable[[float], float], members: list[int]) -> list[float]:
    """What the decay loses over the steps that each member stands for; the first for the mean of the others'."""
    gap = (members[-1] - members[0]) / (len(members) - 1)
    marks = [members[0] - gap, *members]
    left = [decay((mark - marks[0]) / (members[-1] - marks[0])) for mark in marks]
    return [before - after for before, after in pairwise(left)]


DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
}
LENGTHS: dict[str, tuple[WindowRule, Callable[[list[int]], list[int]]]] = {
    "last": (WindowRule(last=7), lambda steps: steps[-7:]),
    "last_steps": (WindowRule(last_steps=4500), lambda steps: [one for one in steps if one > steps[-1] - 4500]),
    "last_fraction": (WindowRule(last_fraction=0.9), lambda steps: [one for one in steps if 10 * one > steps[-1]]),
}

PROFILES: dict[str, tuple[Rule, Callable[[list[int]], list[float]]]] = {
    "swa": (SwaRule(), mean),
    "ema, half-life": (EmaRule(half_life_steps=60), half_life),
    "ema, half-life, first": (EmaRule(half_life_steps=60, init="first"), half_life_from_the_first),
    "ema, half-life, ramped up": (EmaRule(half_life_steps=60, rampup=0.1), ramped_up),
    "ema, decay": (EmaRule(decay=0.9), decay_per_fold),
    "ema, decay, first": (EmaRule(decay=0.9, init="first"), decay_from_the_first),
    "ema, decay, warmed up": (EmaRule(decay=0.9, warmup=10), warmed_up),
    "power": (PowerEmaRule(sigma_rel=0.1), power),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PROFILES)
def test_one_hot_checkpoints_give_the_closed_form_profile(name: str, schedule: str) -> None:
    """Every lerp rule's average of unit vectors is its closed-form profile, at whatever intervals."""
    (rule, profile), steps = PROFILES[name], SCHEDULES[schedule]
    shadow = ShadowWeights(rule, dtype=torch.float64)

    for step, unit in zip(steps, torch.eye(len(steps), dtype=torch.float64), strict=True):
        shadow.fold({"w": unit}, step=step)

    found = shadow.value()["w"].tolist()
    assert found == pytest.approx(profile(steps), rel=1e-8, abs=1e-15)
    assert found == pytest.approx(list(shadow.coefficients().values()), rel=1e-12, abs=1e-15)
    assert found == pytest.approx(list(rule.coefficients(steps).values()), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", ["uniform", *DECAYS])
@pytest.mark.parametrize("length", LENGTHS)
def test_one_hot_files_give_a_window_s_closed_form_profile(
    tmp_path: Path, length: str, shape: Any, schedule: str
) -> None:
    """Every window's average of files that hold unit vectors is its closed-form profile, however it is cut."""
    (rule, cut), steps = LENGTHS[length], SCHEDULES[schedule]
    rule, members = replace(rule, shape=shape), cut(steps)
    for step, unit in zip(steps, torch.eye(len(steps), dtype=torch.float64), strict=True):
        save_file({"w": unit}, tmp_path / f"step_{step}.safetensors")

    average_files(list(tmp_path.iterdir()), rule, tmp_path / "average.safetensors")

    found = load_file(tmp_path / "average.safetensors")["w"].tolist()
    inside = decayed(DECAYS[shape], members) if shape in DECAYS else [1 / len(members)] * len(members)
    expected = [0.0] * (len(steps) - len(members)) + inside
    assert len(members) > 1
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert found[-len(members) :] == pytest.approx(list(rule.coefficients(steps).values()), rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "checkpoint_dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2],
)
@pytest.mark.parametrize("name", PROFILES)
def test_a_constant_stays_exactly_constant(name: str, checkpoint_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Averaging the same weights over and over gives these weights, bit for bit, at every fold."""
    rule, _ = PROFILES[name]
    shadow = ShadowWeights(rule, dtype=dtype)
    constant = (3 * torch.randn(257, generator=torch.Generator().manual_seed(0))).to(checkpoint_dtype)
    for step in SCHEDULES["irregular"]:
        shadow.fold({"w": constant}, step=step)
        assert torch.equal(shadow.value()["w"].view(torch.uint8), constant.view(torch.uint8))
