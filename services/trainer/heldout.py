"""Held-out metrics of the raw weights while they train, and whether they have stopped getting better.

Rank 0 alone measures; what it decides the ranks agree on. The invariant: what is decided after a step depends on
the measurements up to it alone, and those are resumed with the run.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from wa_core.records import HEADLINE_METRIC

if TYPE_CHECKING:
    from torch import nn

    from wa_core.recipe import Recipe
    from wa_core.records import TrainingOptions

PREFIX = "heldout_"


class Heldout:
    """Measures when it is time to, and remembers the best."""

    def __init__(self, options: TrainingOptions, recipe: Recipe) -> None:
        self._every_steps = options.evaluate_every_steps
        self._early_stop = options.early_stop
        self._recipe = recipe
        self._best = math.inf
        self._num_worse = 0

    @property
    def is_over(self) -> bool:
        """Whether training should end, because the last evaluations were no better than the best before."""
        return self._early_stop is not None and self._num_worse >= self._early_stop.patience

    def is_due(self, step: int) -> bool:
        """Whether the weights after `step` steps are to be measured."""
        return self._every_steps is not None and step % self._every_steps == 0

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The metrics of `model` on held-out data, as ``heldout_loss`` and so on."""
        metrics = self._recipe.evaluate(model, self._recipe.heldout_batches())
        self._note(metrics[HEADLINE_METRIC])
        return {PREFIX + name: value for name, value in metrics.items()}

    def _note(self, loss: float) -> None:
        min_delta = self._early_stop.min_delta if self._early_stop else 0.0
        if loss < self._best - min_delta:
            self._best, self._num_worse = loss, 0
        else:
            self._num_worse += 1

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {"best": self._best, "num_worse": self._num_worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._best, self._num_worse = state["best"], state["num_worse"]
