"""Averaging rules: how much each new checkpoint counts. Plain floats; no tensors, no torch.

Every rule is one number per fold, the lerp weight ``w`` in ``shadow += w * (checkpoint - shadow)``. That form has
4 to 22 times less rounding error than ``d * shadow + (1 - d) * checkpoint``.

It knows nothing of tensors or of where checkpoints come from. The invariant: the first fold weighs exactly 1 and
every later one lies in [0, 1], so the coefficients of an average always sum to 1.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LN2 = math.log(2.0)
_MAX_STEP = 2**63 - 1
_MAX_SPELLING = 200
_EXAMPLES = "known rules: 'swa', 'swa:start_step=100', 'ema:half_life=500', 'ema:decay=0.99,init=first'"
_NUMBER = re.compile(r"[+-]?([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")


class Rule(Protocol):
    """What folding asks of a lerp-type rule."""

    @property
    def start_step(self) -> int:
        """The first step that counts."""
        ...

    @property
    def spelling(self) -> str:
        """The canonical text that `parse_rule` turns back into an equal rule."""
        ...

    def counts(self, step: int) -> bool:
        """Whether the checkpoint of `step` belongs in the average."""
        ...

    def weight(self, *, n_averaged: int, step: int, prev_step: int | None) -> float:
        """The lerp weight of the checkpoint of `step`, in [0, 1]; exactly 1 for the first fold.

        Args:
            n_averaged: checkpoints folded before this one.
            step: the optimizer step of the checkpoint.
            prev_step: the step of the fold before, or None when there is none.

        Raises:
            InvalidInputError: `step` does not count, or does not go forward from `prev_step`.
        """
        ...


@dataclass(frozen=True)
class SwaRule:
    """Equal weights: the running mean ``w_SWA <- (w_SWA * n + w) / (n + 1)``.

    Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", Algorithm 1.
    """

    start_step: int = 0

    def __post_init__(self) -> None:
        _check_start_step(self.start_step)

    @property
    def spelling(self) -> str:
        """``swa`` or ``swa:start_step=100``."""
        return _spell("swa", {"start_step": self.start_step or None})

    def counts(self, step: int) -> bool:
        """Whether `step` is at or after the start."""
        return step >= self.start_step

    def weight(self, *, n_averaged: int, step: int, prev_step: int | None) -> float:
        """``1 / (n + 1)``."""
        _check_progress(self.start_step, n_averaged=n_averaged, step=step, prev_step=prev_step)
        return 1.0 / (n_averaged + 1)


@dataclass(frozen=True)
class EmaRule:
    """Exponential weights, unbiased from the first fold on.

    Either a half-life in optimizer *steps*, so that the average does not change its meaning with the checkpoint
    interval (Karras et al. 2020, StyleGAN2, and its half-life form of the decay), or a `decay` per *fold*.

    ``init="debias"`` divides by the mass gathered so far (Kingma & Ba 2015, "Adam", section 3), in closed form:
    with ``d = 2 ** (-1 / half_life_steps)`` the weight is ``(1 - d**gap) / (1 - d**(step - start_step))``, with a
    decay per fold ``(1 - d) / (1 - d**(n + 1))``. A checkpoint stands for the steps since the one before it (the
    first: since `start_step`), so one taken at `start_step` itself stands for none and fades at the second fold.
    ``init="first"`` copies the first checkpoint and then decays plainly, as `torch.optim.swa_utils` does; the
    first checkpoint then weighs ``d**(n - 1)``.
    """

    half_life_steps: float | None = None
    decay: float | None = None
    start_step: int = 0
    init: Literal["debias", "first"] = "debias"

    def __post_init__(self) -> None:
        _check_start_step(self.start_step)
        if (self.half_life_steps is None) == (self.decay is None):
            raise InvalidInputError(
                f"an EMA takes half_life_steps or decay, exactly one of them, not half_life_steps="
                f"{self.half_life_steps!r} and decay={self.decay!r}; write for example 'ema:half_life=500'"
            )
        if self.half_life_steps is not None:
            _check_half_life(self.half_life_steps)
        if self.decay is not None:
            _check_decay(self.decay)
        if self.init not in ("debias", "first"):
            raise InvalidInputError(f"init is {self.init!r}; it must be 'debias' or 'first'")

    @property
    def spelling(self) -> str:
        """Such as ``ema:half_life=60,start_step=100``."""
        init = None if self.init == "debias" else self.init
        options = {"half_life": self.half_life_steps, "decay": self.decay}
        return _spell("ema", {**options, "start_step": self.start_step or None, "init": init})

    def counts(self, step: int) -> bool:
        """Whether `step` is at or after the start."""
        return step >= self.start_step

    def weight(self, *, n_averaged: int, step: int, prev_step: int | None) -> float:
        """See the class; computed with `expm1`, so that decays very near 1 keep their accuracy."""
        _check_progress(self.start_step, n_averaged=n_averaged, step=step, prev_step=prev_step)
        if n_averaged == 0 or prev_step is None:
            return 1.0
        if self.decay is not None:
            return self._weight_per_fold(self.decay, n_averaged=n_averaged)
        log_decay = -_LN2 / float(self.half_life_steps or 1)
        new = -math.expm1(log_decay * (step - prev_step))
        if self.init == "first":
            return new
        return new / -math.expm1(log_decay * (step - self.start_step))

    def _weight_per_fold(self, decay: float, *, n_averaged: int) -> float:
        if self.init == "first" or decay == 0:
            return 1.0 - decay
        return (1.0 - decay) / -math.expm1(math.log(decay) * (n_averaged + 1))


def next_coefficients(coefficients: Mapping[int, float], *, step: int, weight: float) -> dict[int, float]:
    """The average as a weighted sum of checkpoints after one more fold: ``step -> coefficient``, summing to 1.

    Args:
        coefficients: those before the fold; empty before the first.
        step: the step of the checkpoint being folded.
        weight: its lerp weight.

    Raises:
        InvalidInputError: `step` is already in the average, or `weight` is no number in [0, 1].
    """
    if step in coefficients:
        raise InvalidInputError(f"step {step} is already in the average; a checkpoint counts once")
    if not 0.0 <= weight <= 1.0:
        raise InvalidInputError(f"a fold's weight must be in [0, 1], not {weight!r}")
    return {**{old: value * (1.0 - weight) for old, value in coefficients.items()}, step: weight}


def parse_rule(text: str) -> Rule:
    """Read a rule as users spell it: ``name`` or ``name:key=value,key=value``.

    Raises:
        InvalidInputError: the text is not a rule, or asks for an impossible one; the message shows the spelling.
    """
    if not isinstance(text, str) or len(text) > _MAX_SPELLING:
        shown = f"text of {len(text)} characters" if isinstance(text, str) else type(text).__name__
        raise InvalidInputError(
            f"a rule is a text of at most {_MAX_SPELLING} characters, not {shown}; {_EXAMPLES}"
        )
    name, colon, rest = text.partition(":")
    if name not in _RULES:
        raise InvalidInputError(f"{text!r}: there is no rule {name!r}{_did_you_mean(name, _RULES)}; {_EXAMPLES}")
    if colon and not rest:
        raise InvalidInputError(f"{text!r}: nothing follows the colon; write {name!r} alone, or options after it")
    rule, keys = _RULES[name]
    values = _parse_options(text, rest, keys=keys) if rest else {}
    try:
        return rule(**values)
    except InvalidInputError as error:
        raise InvalidInputError(f"{text!r}: {error.message}") from error


def _parse_options(text: str, rest: str, *, keys: Mapping[str, _Key]) -> dict[str, float | int | str]:
    values: dict[str, float | int | str] = {}
    for option in rest.split(","):
        key, _, raw = option.partition("=")
        if key not in keys:
            known = ", ".join(f"{known}=…" for known in keys)
            hint = _did_you_mean(key, keys)
            raise InvalidInputError(f"{text!r}: there is no option {key!r}{hint}; this rule takes {known}")
        field, read = keys[key]
        if field in values:
            raise InvalidInputError(f"{text!r}: {key} is given twice; give it once")
        values[field] = read(text, key, raw)
    return values


def _read_number(text: str, key: str, raw: str) -> float:
    if not _NUMBER.fullmatch(raw):
        raise InvalidInputError(
            f"{text!r}: {key} must be a plain number, not {raw!r}; write "
            f"{key}={0.99 if key == 'decay' else 500}, without quotes or spaces"
        )
    return float(raw)


def _read_integer(text: str, key: str, raw: str) -> int:
    if not _INTEGER.fullmatch(raw):
        raise InvalidInputError(f"{text!r}: {key} must be a whole number, not {raw!r}; write {key}=100")
    return int(raw)


def _read_word(text: str, key: str, raw: str) -> str:
    if not raw:
        raise InvalidInputError(f"{text!r}: {key} has no value; write {key}=debias or {key}=first")
    return raw


_Key = tuple[str, "Callable[[str, str, str], float | int | str]"]
_START: dict[str, _Key] = {"start_step": ("start_step", _read_integer)}
_EMA_KEYS: dict[str, _Key] = {
    "half_life": ("half_life_steps", _read_number),
    "decay": ("decay", _read_number),
    **_START,
    "init": ("init", _read_word),
}
_RULES: dict[str, tuple[Callable[..., Rule], dict[str, _Key]]] = {
    "swa": (SwaRule, _START),
    "ema": (EmaRule, _EMA_KEYS),
}


def _spell(name: str, options: Mapping[str, float | str | None]) -> str:
    shown = [f"{key}={_spell_value(value)}" for key, value in options.items() if value is not None]
    return f"{name}:{','.join(shown)}" if shown else name


def _spell_value(value: float | str) -> str:
    return repr(float(value)).removesuffix(".0") if isinstance(value, float) else str(value)


def _did_you_mean(word: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(word.strip().lower(), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_STEP


def _check_start_step(value: int) -> None:
    if not _is_step(value):
        raise InvalidInputError(
            f"start_step is {_shorten(value)}; it must be a whole number from 0 to {_MAX_STEP}"
        )


def _check_half_life(value: float) -> None:
    # The upper bound also keeps integers too long for a float out.
    if not _is_number(value) or not 0 < value <= 1e18:  # noqa: PLR2004 - far beyond any training
        raise InvalidInputError(
            f"half_life is {_shorten(value)}; it must be a finite number of steps above 0 (at most 1e18), "
            f"such as half_life=500"
        )


def _check_decay(value: float) -> None:
    if not _is_number(value) or not 0 <= value < 1:
        raise InvalidInputError(f"decay is {_shorten(value)}; it must be a number in [0, 1), such as decay=0.99")


def _check_progress(start_step: int, *, n_averaged: int, step: int, prev_step: int | None) -> None:
    if not _is_step(step) or not _is_step(n_averaged):
        raise InvalidInputError(
            f"step is {_shorten(step)} and n_averaged {_shorten(n_averaged)}; both must be whole numbers from 0 on"
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


def _shorten(value: object) -> str:
    # An integer of 10,000 digits cannot even be printed; nobody needs to see it whole.
    if isinstance(value, int) and value.bit_length() > 256:  # noqa: PLR2004 - about 77 digits
        return f"an integer of {value.bit_length()} bits"
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}…"  # noqa: PLR2004 - one line on a terminal
