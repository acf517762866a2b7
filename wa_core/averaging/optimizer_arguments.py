"""What an optimizer wrapper is told about when, how and at which learning rate to average: checked and settled.

Plain numbers; it knows no optimizer. The invariant: a wrong value raises before anything warns, so that where
warnings are errors a wrong value is still reported as one.
"""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any, Literal

from wa_core.errors import InvalidInputError


def check_mode(mode: Any) -> Literal["swa"] | float:  # noqa: ANN401 - whatever the caller passed
    """``"swa"``, or a decay in [0, 1) as a float.

    Raises:
        InvalidInputError: anything else.
    """
    if isinstance(mode, str) and mode == "swa":
        return "swa"
    decay = _number(mode)
    if 0 <= decay < 1:
        return decay
    raise InvalidInputError(
        f"mode is {mode!r}; it must be 'swa' for the running mean, or the decay of an exponential average, a "
        f"number in [0, 1) such as 0.99"
    )


def settle_schedule(
    wa_start: Any,  # noqa: ANN401 - whatever the caller passed
    wa_freq: Any,  # noqa: ANN401
    wa_lr: Any,  # noqa: ANN401
    *,
    stacklevel: int,
) -> tuple[int | None, int | None, float | None]:
    """Start, interval and learning rate of the automatic mode, or three times None for the manual mode.

    Warns (`UserWarning`) about what it casts or ignores.

    Args:
        wa_start: steps before averaging starts, >= 0.
        wa_freq: steps from one average to the next, >= 1.
        wa_lr: a learning rate >= 0.
        stacklevel: as for `warnings.warn`, seen from here.

    Raises:
        InvalidInputError: a value outside its range, or no number at all.
    """
    start, freq = _check_count("wa_start", wa_start, minimum=0), _check_count("wa_freq", wa_freq, minimum=1)
    rate = _check_learning_rate(wa_lr)
    for message in _warnings({"wa_start": wa_start, "wa_freq": wa_freq}, rate):
        warnings.warn(message, UserWarning, stacklevel=stacklevel)
    if start is None or freq is None:
        return None, None, None
    return start, freq, rate


def _warnings(given: dict[str, Any], rate: float | None) -> list[str]:
    found = [
        f"{name} is {value!r}, which is no whole number; it is taken as {int(value)}"
        for name, value in given.items()
        if value is not None and not _is_integer(value)
    ]
    alone = [name for name, value in given.items() if value is not None]
    if len(alone) == 1:
        found.append(f"{alone[0]} is ignored alone, and the mode is manual; give wa_start and wa_freq, or neither")
    if len(alone) < len(given) and rate is not None:
        found.append(f"wa_lr={rate} is ignored in manual mode; give wa_start and wa_freq, or use a scheduler")
    return found


def _check_count(name: str, value: Any, *, minimum: int) -> int | None:  # noqa: ANN401 - as above
    if value is None:
        return None
    try:
        number = int(value)
        # Before the cast as well: -0.5 is no 0, and 0.5 no interval.
        is_allowed = number >= minimum and (not isinstance(value, float) or _number(value) >= minimum)
    except (TypeError, ValueError, OverflowError):
        is_allowed = False
    if not is_allowed:
        raise InvalidInputError(f"{name} is {value!r}; it must be a whole number of steps, at least {minimum}")
    return number


def _check_learning_rate(value: Any) -> float | None:  # noqa: ANN401 - as above
    if value is None:
        return None
    if not 0 <= (rate := _number(value)) < math.inf:
        raise InvalidInputError(
            f"wa_lr is {value!r}; it must be a number from 0 on, or None to leave the rate alone"
        )
    return rate


def _number(value: object) -> float:
    # NaN is in no range.
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.inf


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
