"""The learning rates of each step: the recipe's scheduler's, and those of the run's schedule from where it begins.

It knows an optimizer's groups and no data, no model. The invariant: the rates of a step depend on the schedule,
the recipe and the step alone, so a resumed run has those of an undisturbed one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from wa_core.records import ConstantRate, CyclicalRate, WarmupStableRate

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from wa_core.records import LrSchedule


class Rates:
    """Sets the rates before each step of the optimizer, and steps the recipe's scheduler while that counts.

    Args:
        schedule: the run's own; None leaves the rates to `scheduler` alone.
        optimizer: whose groups have the rates.
        scheduler: the recipe's; None is a constant rate.
    """

    def __init__(self, schedule: LrSchedule | None, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
        self._schedule = schedule
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._own = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self._at_start: list[float] | None = None

    def begin_step(self, step: int) -> None:
        """Set the rates of step `step` (from 0)."""
        if self._schedule is None or step < _first_step(self._schedule):
            return
        groups = self._optimizer.param_groups
        if self._at_start is None:
            self._at_start = [float(group["lr"]) for group in groups]
        for group, own, at_start in zip(groups, self._own, self._at_start, strict=True):
            group["lr"] = scheduled_rate(self._schedule, step, own=own, at_start=at_start)

    def end_step(self, step: int) -> None:
        """Step the recipe's scheduler after step `step`, unless the run's schedule has taken over."""
        is_its_turn = self._schedule is None or step < _first_step(self._schedule)
        if self._scheduler is not None and is_its_turn:
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: the rates that the schedule began from."""
        return {"at_start": self._at_start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._at_start = state["at_start"]


def scheduled_rate(schedule: LrSchedule, step: int, *, own: float, at_start: float) -> float:
    """The rate of step `step` (from 0), which is not before the schedule's first.

    Args:
        schedule: the run's.
        step: training steps done before this one.
        own: the rate that the optimizer was built with.
        at_start: the recipe's rate at the schedule's first step.
    """
    done = step - _first_step(schedule)
    match schedule:
        case WarmupStableRate():
            return own * min(1.0, (step + 1) / (schedule.warmup_steps + 1))
        case CyclicalRate():
            # Izmailov et al. 2018, section 3.2: a(i) = (1 - t) a1 + t a2, t = (mod(i - 1, c) + 1) / c, i from 1.
            part = (done % schedule.cycle_steps + 1) / schedule.cycle_steps
            return (1 - part) * schedule.lr_max + part * schedule.lr_min
        case ConstantRate():
            part = min(1.0, done / schedule.anneal_steps) if schedule.anneal_steps else 1.0
            part = part if schedule.anneal == "linear" else (1 - math.cos(math.pi * part)) / 2
            return (1 - part) * at_start + part * schedule.lr


def is_checkpoint_due(schedule: LrSchedule | None, step: int, *, every_steps: int) -> bool:
    """Whether the weights after `step` steps are kept: every so many steps, or at the ends of cycles."""
    if isinstance(schedule, CyclicalRate) and step > schedule.start_step:
        return (step - schedule.start_step) % schedule.cycle_steps == 0
    return step % every_steps == 0


def _first_step(schedule: LrSchedule) -> int:
    return 0 if isinstance(schedule, WarmupStableRate) else schedule.start_step
