"""What tests of landscapes share: a recipe whose loss is a bowl, known in closed form, and runs to go through it.

`CHILD` is the command of the landscape process with this recipe in place of the built-in ones.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from services.averager import landscape
from support.averaging import averager, run_until_idle
from support.child import serving
from support.runs import HandmadeRun
from support.untrained import Untrained
from wa_core.records import RecipeConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wa_core.store.base import ObjectStore

CHILD = serving("support.landscapes")
SIZE = 6
SCALES = np.arange(1.0, SIZE + 1)
CENTRE = np.linspace(-1.0, 1.0, SIZE)


class BowlConfig(RecipeConfig):
    """How the recipe behaves, and where it leaves its process id once."""

    mood: str = "fine"
    marks: str = ""


class Bowl(Untrained):
    """A model of six numbers whose loss is a bowl around `CENTRE`; on calibration data it is twice as steep."""

    Config = BowlConfig
    config: BowlConfig

    def build_model(self) -> nn.Module:
        """Two modules of three numbers."""
        return nn.ModuleDict({"left": nn.Linear(3, 1, bias=False), "right": nn.Linear(3, 1, bias=False)})

    def forward(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """No layer needs it."""
        raise AssertionError

    def calibration_batches(self) -> list[torch.Tensor]:
        """What makes it twice as steep."""
        return [torch.full((4,), 2.0)]

    def heldout_batches(self) -> list[torch.Tensor]:
        """More than is wanted."""
        return [torch.ones(4) for _ in range(1000)]

    def evaluate(self, model: nn.Module, batches: Any) -> dict[str, float]:
        """Behave, and measure."""
        self._behave()
        numbers = np.concatenate([value.double().numpy().ravel() for value in model.state_dict().values()])
        steepness = float(torch.cat(list(batches)).mean())
        return {"loss": steepness * bowl(numbers)}

    def _behave(self) -> None:
        if self.config.mood == "raise":
            raise RuntimeError("no such landscape")
        marks = Path(self.config.marks) if self.config.marks else None
        if marks is not None and (self.config.mood == "hang" or not marks.exists()):
            part = marks.with_suffix(".part")
            part.write_text(str(os.getpid()))
            part.rename(marks)
            threading.Event().wait()


def bowl(numbers: NDArray[np.float64]) -> float:
    """The loss at a point."""
    return float(0.5 * np.sum(SCALES * (numbers - CENTRE) ** 2))


def load(_: str, config: Any, *, seed: int, **_others: object) -> Bowl:
    """Any recipe is the bowl."""
    return Bowl(BowlConfig.model_validate(config), seed=seed)


def serve() -> int:
    """The landscape process."""
    return landscape.main(load)


def point(seed: int) -> NDArray[np.float64]:
    """Six numbers that float32 holds."""
    return np.random.Generator(np.random.PCG64(seed)).normal(size=SIZE).astype(np.float32).astype(np.float64)


def as_weights(numbers: Sequence[float] | NDArray[np.float64]) -> dict[str, torch.Tensor]:
    """The model's weights."""
    left, right = torch.tensor(np.asarray(numbers), dtype=torch.float32).reshape(2, 1, 3)
    return {"left.weight": left, "right.weight": right}


def published(store: ObjectStore, steps: Sequence[int] = (10, 20, 30), **config: object) -> HandmadeRun:
    """A run with a checkpoint at `point(step)` for each step, folded and assessed."""
    run = HandmadeRun(store, averages={"swa": "swa"}, config=config)
    for step in steps:
        run.checkpoint(step, as_weights(point(step)))
    run_until_idle(averager(store))
    return run
