r"""Windows: the weighted mean of a run's last checkpoints. Plain floats; no tensors, no torch.

A window forgets, so it is no lerp rule: no single number per fold can take an old checkpoint out again. It yields
its coefficients from the list of steps instead, and is computed from the checkpoints themselves.

Its shape stands for a learning-rate decay (Tian et al. 2025, "WSM: Decay-Free Learning Rate Schedule via
Checkpoint Merging for LLM Pre-training", arXiv 2507.17634, Theorem 3.1). With checkpoints ``theta_0 .. theta_k``
and ``theta_j = theta_0 - sum_{i<=j} g_i``, the merge ``sum_j c_j theta_j`` equals ``theta_0 - sum_i w_i g_i`` with
``w_i = sum_{j>=i} c_j``: training at a constant rate and merging is as if the update that led to checkpoint ``i``
had been scaled by ``w_i``. So a wanted decay ``1 >= w_1 >= .. >= w_k >= 0`` gives the coefficients

    ``c_0 = 1 - w_1,   c_j = w_j - w_{j+1},   c_k = w_k``.

The paper leaves open where a continuous decay ``D(x)``, from ``D(0) = 1`` to ``D(1) = 0``, is sampled. Here a
checkpoint stands for the steps since the one before it, as in the other rules: with ``x_j`` the part of the window
that has passed at checkpoint ``j``, the update that led to checkpoint ``i`` is scaled by its rate at the start,
``w_i = D(x_{i-1})``, so that ``c_j = D(x_{j-1}) - D(x_j)`` is what the decay loses in those steps. The first
checkpoint stands for as many steps as the others do on average. This makes the paper's pairing exact: the plain
mean is linear decay. Where checkpoints come at irregular steps the two differ: ``uniform`` counts checkpoints,
``linear`` counts steps.

The invariant: coefficients are at least 0, sum to 1, and depend on nothing but the steps in the window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from wa_core.averaging.limits import MAX_STEP, check_range, check_start_step, check_steps, check_whole
from wa_core.averaging.spelling import spell
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Shape = Literal["uniform", "linear", "minus_sqrt", "cosine"]

# The learning rate as a part of its peak, after the part x of the decay.
_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "minus_sqrt": lambda x: 1.0 - math.sqrt(x),
    # Half the cosine of half the angle: (1 + cos(pi x)) / 2 without its cancellation near x = 1.
    "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
}
SHAPES = ("uniform", *_DECAYS)


@dataclass(frozen=True)
class WindowRule:
    """The last checkpoints of a run, weighted by a shape.

    Exactly one of `last`, `last_steps` and `last_fraction` says how far the window reaches back.

    Args:
        last: this many checkpoints.
        shape: ``uniform`` (LAWA: Kaddour 2022, arXiv 2209.14981), ``linear``, ``minus_sqrt`` or ``cosine``: the
            learning-rate decay that the merge stands for.
        last_steps: the checkpoints of the last so many optimizer steps.
        last_fraction: the checkpoints of this part of the run, in (0, 1]; its length is the run's total steps,
            or its last step where the total is not known.
        start_step: checkpoints before this step do not count.

    Raises:
        InvalidInputError: an impossible window.

    Source: Tian et al. 2025, arXiv 2507.17634, Theorem 3.1; see this module.
    """

    last: int | None = None
    shape: Shape = "uniform"
    last_steps: int | None = None
    last_fraction: float | None = None
    start_step: int = 0

    def __post_init__(self) -> None:
        check_start_step(self.start_step)
        lengths = {"last": self.last, "last_steps": self.last_steps, "last_fraction": self.last_fraction}
        if sum(value is not None for value in lengths.values()) != 1:
            given = ", ".join(f"{key}={value!r}" for key, value in lengths.items() if value is not None)
            raise InvalidInputError(
                f"a window takes last, last_steps or last_fraction, exactly one of them, not {given or 'none'}; "
                f"write for example 'window:last=8'"
            )
        for key, value in (("last", self.last), ("last_steps", self.last_steps)):
            if value is not None:
                check_whole(key, value, low=1, high=MAX_STEP, means=f"a whole number from 1 on, such as {key}=8")
        if self.last_fraction is not None:
            example = "a number above 0 and at most 1, such as last_fraction=0.2"
            check_range("last_fraction", self.last_fraction, low=1e-18, high=1, means=example)
        if self.shape not in SHAPES:
            raise InvalidInputError(f"shape is {self.shape!r}; it must be one of {', '.join(SHAPES)}")

    @property
    def spelling(self) -> str:
        """Such as ``window:last=8,shape=cosine``."""
        options = {"last": self.last, "last_steps": self.last_steps, "last_fraction": self.last_fraction}
        shape = None if self.shape == "uniform" else self.shape
        return spell("window", {**options, "shape": shape, "start_step": self.start_step or None})

    def counts(self, step: int) -> bool:
        """Whether `step` is at or after the start; the window may have passed it all the same."""
        return step >= self.start_step

    def coefficients(self, steps: Sequence[int], *, total_steps: int | None = None) -> dict[int, float]:
        """Step -> coefficient of the checkpoints inside the window; at least 0 each, summing to 1.

        Args:
            steps: the steps of all checkpoints, ascending.
            total_steps: the run's length, which `last_fraction` is a part of; the last step when None.

        Raises:
            InvalidInputError: `steps` do not ascend, or `total_steps` is before the last of them.
        """
        check_steps(steps)
        members = self._members([step for step in steps if self.counts(step)], total_steps=total_steps)
        if self.shape == "uniform":
            return dict.fromkeys(members, 1.0 / len(members)) if members else {}
        return dict(zip(members, merge_coefficients(self._decay_weights(members)), strict=True)) if members else {}

    def _members(self, steps: list[int], *, total_steps: int | None) -> list[int]:
        if self.last is not None or not steps:
            return steps[-self.last :] if self.last is not None else []
        length = Fraction(self.last_steps or 0)
        if self.last_fraction is not None:
            total = steps[-1] if total_steps is None else total_steps
            if total < steps[-1]:
                raise InvalidInputError(
                    f"the run has {total} steps but a checkpoint of step {steps[-1]}; give the true total_steps"
                )
            # As the user wrote it: 0.7 of 10 steps are 7, not 7.000000000000001.
            length = Fraction(repr(float(self.last_fraction))) * total
        return [step for step in steps if step > steps[-1] - length] or steps[-1:]

    def _decay_weights(self, members: list[int]) -> list[float]:
        """``w_1 .. w_k``: the decay at the start of each update between two members."""
        if len(members) == 1:
            return []
        decay, span = _DECAYS[self.shape], members[-1] - members[0]
        gap = span / (len(members) - 1)
        return [decay((step - members[0] + gap) / (span + gap)) for step in members[:-1]]


def merge_coefficients(weights: Sequence[float]) -> list[float]:
    """The merge that stands for a decay: ``c_0 = 1 - w_1, c_j = w_j - w_{j+1}, c_k = w_k``.

    Args:
        weights: ``w_1 .. w_k``, how far each update between two neighbouring checkpoints is to count;
            ``1 >= w_1 >= .. >= w_k >= 0``.

    Returns:
        ``c_0 .. c_k``, one coefficient per checkpoint, oldest first; at least 0 each, summing to 1.

    Raises:
        InvalidInputError: the weights rise, or leave [0, 1].

    Source: Tian et al. 2025, arXiv 2507.17634, Theorem 3.1.
    """
    path = [1.0, *weights, 0.0]
    for before, after in pairwise(path):
        if not before >= after:
            raise InvalidInputError(
                f"a decay's weights must fall from 1 to 0, but {after} comes after {before}; an update "
                f"cannot count more than the ones before it when checkpoints are averaged"
            )
    return [before - after for before, after in pairwise(path)]
