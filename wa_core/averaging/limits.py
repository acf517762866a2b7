"""What a rule accepts as a step, a number and a list of steps. Knows no rule.

The invariant: whatever passes here is safe to calculate with; it is finite, of the right type and in range.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_STEP = 2**63 - 1


def is_number(value: object) -> bool:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_step(value: object) -> bool:
    """Whether it is a whole number that a step can be."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_STEP


def check_start_step(value: int) -> None:
    """Refuse what is no step.

    Raises:
        InvalidInputError: as said.
    """
    if not is_step(value):
        raise InvalidInputError(f"start_step is {shorten(value)}; it must be a whole number from 0 to {MAX_STEP}")


def check_range(name: str, value: float, *, low: float, high: float, means: str) -> None:
    """Refuse what is no number from `low` to `high`; `means` ends the message, with an example.

    Raises:
        InvalidInputError: as said.
    """
    # Comparing first keeps NaN, infinities and integers too long for a float out.
    if not is_number(value) or not low <= value <= high:
        raise InvalidInputError(f"{name} is {shorten(value)}; it must be {means}")


def check_whole(name: str, value: int, *, low: int, high: int, means: str) -> None:
    """Refuse what is no whole number from `low` to `high`; `means` ends the message, with an example.

    Raises:
        InvalidInputError: as said.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidInputError(f"{name} is {shorten(value)}; it must be {means}")


def check_steps(steps: Sequence[int]) -> None:
    """Refuse steps that are no whole numbers from 0 on, or do not go forward.

    Raises:
        InvalidInputError: as said; with the code `step_backwards` when they do not go forward.
    """
    for step in steps:
        if not is_step(step):
            raise InvalidInputError(f"step is {shorten(step)}; steps must be whole numbers from 0 to {MAX_STEP}")
    for before, after in pairwise(steps):
        if after <= before:
            raise InvalidInputError(
                f"step {after} comes after step {before}; give each step once, in ascending order",
                code="step_backwards",
            )


def check_progress(start_step: int, *, n_averaged: int, step: int, prev_step: int | None) -> None:
    """Refuse to fold the checkpoint of `step` out of order.

    Raises:
        InvalidInputError: no steps, before the start, or (code `step_backwards`) not after `prev_step`.
    """
    if not is_step(step) or not is_step(n_averaged):
        raise InvalidInputError(
            f"step is {shorten(step)} and n_averaged {shorten(n_averaged)}; both must be whole numbers from 0 on"
        )
    if step < start_step:
        raise InvalidInputError(f"step {step} is before start_step {start_step}, so this rule does not count it")
    is_first = n_averaged == 0 and prev_step is None
    is_next = prev_step is not None and prev_step < step and (n_averaged == 0 or prev_step >= start_step)
    if not is_first and not is_next:
        raise InvalidInputError(
            f"step {step} does not go forward: {n_averaged} checkpoints are folded, the last at step {prev_step}, "
            f"and the rule starts at {start_step}; fold each checkpoint once, in the order of their steps",
            code="step_backwards",
        )


def shorten(value: object) -> str:
    """A value as an error message shows it, on one line of a terminal."""
    # An integer of 10,000 digits cannot even be printed; nobody needs to see it whole.
    if isinstance(value, int) and value.bit_length() > 256:  # noqa: PLR2004 - about 77 digits
        return f"an integer of {value.bit_length()} bits"
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}…"  # noqa: PLR2004 - one line on a terminal
