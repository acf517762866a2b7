"""Averaging rules: how much each new checkpoint counts. Plain floats; no tensors, no torch.

A lerp rule is one number per fold, the weight ``w`` in ``shadow += w * (checkpoint - shadow)``. That form has
4 to 22 times less rounding error than ``d * shadow + (1 - d) * checkpoint``. Windows are the other kind
(`wa_core.averaging.windows`); every rule of either kind yields its coefficients from a list of steps.

It knows nothing of tensors or of where checkpoints come from. The invariant: the first fold weighs exactly 1 and
every later one lies in [0, 1], so the coefficients of an average always sum to 1.

A checkpoint stands for the steps since the one before it (the first: since `start_step`). A rule defined in steps
gives it what the rule's continuous profile gives to those steps, so an average does not change its meaning with
the checkpoint interval. A checkpoint taken at `start_step` itself stands for no step and fades at the second fold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

from wa_core.averaging.decays import log_left, log_left_of_zero
from wa_core.averaging.limits import (
    check_progress,
    check_range,
    check_start_step,
    check_steps,
    check_whole,
    shorten,
)
from wa_core.averaging.spelling import Option, did_you_mean, read_options, spell
from wa_core.averaging.windows import WindowRule
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_MAX_SPELLING = 200
_EXAMPLES = (
    "known rules: 'swa', 'swa:start_step=100', 'ema:half_life=500', 'ema:decay=0.99,init=first', "
    "'power:sigma_rel=0.1', 'window:last=8,shape=cosine', 'lawa:last=8'"
)


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

    def coefficients(self, steps: Sequence[int], *, total_steps: int | None = None) -> dict[int, float]:
        """The average over the checkpoints of `steps` as a weighted sum: step -> coefficient, summing to 1.

        Args:
            steps: the steps of all checkpoints, ascending; those that do not count are left out.
            total_steps: the run's length, which only windows over a fraction of the run ask for.

        Raises:
            InvalidInputError: `steps` do not ascend.
        """
        ...


class _Lerp:
    """What all lerp rules share: where they start, and their coefficients."""

    def counts(self: Rule, step: int) -> bool:
        """Whether `step` is at or after the start."""
        return step >= self.start_step

    def coefficients(self: Rule, steps: Sequence[int], *, total_steps: int | None = None) -> dict[int, float]:  # noqa: ARG002 - windows need it
        """See `Rule`. As `next_coefficients` fold after fold, but in linear time: from the last fold back."""
        check_steps(steps)
        counted = [step for step in steps if self.counts(step)]
        before = [None, *counted]
        found, remaining = {}, 1.0
        for n in reversed(range(len(counted))):
            weight = self.weight(n_averaged=n, step=counted[n], prev_step=before[n])
            found[counted[n]] = weight * remaining
            remaining *= 1.0 - weight
        return dict(reversed(found.items()))


@dataclass(frozen=True)
class SwaRule(_Lerp):
    """Equal weights: the running mean ``w_SWA <- (w_SWA * n + w) / (n + 1)``.

    Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", Algorithm 1.
    """

    start_step: int = 0

    def __post_init__(self) -> None:
        check_start_step(self.start_step)

    @property
    def spelling(self) -> str:
        """``swa`` or ``swa:start_step=100``."""
        return spell("swa", {"start_step": self.start_step or None})

    def weight(self, *, n_averaged: int, step: int, prev_step: int | None) -> float:
        """``1 / (n + 1)``."""
        check_progress(self.start_step, n_averaged=n_averaged, step=step, prev_step=prev_step)
        return 1.0 / (n_averaged + 1)


@dataclass(frozen=True)
class EmaRule(_Lerp):
    """Exponential weights, unbiased from the first fold on.

    Either a half-life in optimizer *steps*, so that the average does not change its meaning with the checkpoint
    interval (Karras et al. 2020, StyleGAN2, and its half-life form of the decay), or a `decay` per *fold*.

    ``init="debias"`` divides by the mass gathered so far (Kingma & Ba 2015, "Adam", section 3): with ``D(a, b)``
    for what is left at step ``b`` of the weight at step ``a``, a fold weighs
    ``(1 - D(prev_step, step)) / (1 - D(start_step, step))``. With a half-life
    ``D(a, b) = 2**((a - b) / half_life)``; with a decay per fold it comes to ``(1 - d) / (1 - d**(n + 1))``.
    ``init="first"`` copies the first checkpoint and then decays plainly, as `torch.optim.swa_utils` does; the
    first checkpoint then weighs ``d**(n - 1)``.

    Both can warm up, so that an early average is not held back by a decay meant for a long run:

    - `rampup`, with a half-life: the half-life is ``min(half_life, rampup * (step - start_step))``, as in
      StyleGAN2-ADA and EDM (``ema_rampup_ratio``, 0.05), here integrated over the steps between two checkpoints.
      While it lasts ``D(a, b) = (a / b)**(ln 2 / rampup)``, counted from the start: a power-function average.
      Nothing is left of what was before the start, so there is no bias, and `init` makes no difference.
    - `warmup`, with a decay per fold: the decay ``d_n`` is ``min(decay, (1 + n) / (warmup + n))`` at the fold
      after ``n`` others, as in TensorFlow's ``ExponentialMovingAverage`` (there 10). The mass gathered is 1 less
      the product of all decays so far, ``(warmup - 1)! (n + 1)! / (n + warmup)!`` while it lasts;
      a fold weighs ``(1 - d_n)`` over that mass. (With ``warmup=2`` that is SWA, as long as the warm-up lasts.)

    Args:
        half_life_steps: optimizer steps after which a checkpoint counts half, > 0.
        decay: what a fold leaves of the folds before it, in [0, 1).
        start_step: the first optimizer step that counts, >= 0.
        init: ``debias`` or ``first``.
        rampup: the half-life as a part of the steps so far, from 1e-9 to 1000; None for the whole one at once.
        warmup: folds, from 2 to 1,000,000; None for the whole decay at once.

    Raises:
        InvalidInputError: both or neither of `half_life_steps` and `decay`, or a value outside its range.
    """

    half_life_steps: float | None = None
    decay: float | None = None
    start_step: int = 0
    init: Literal["debias", "first"] = "debias"
    rampup: float | None = None
    warmup: int | None = None

    def __post_init__(self) -> None:
        check_start_step(self.start_step)
        if (self.half_life_steps is None) == (self.decay is None):
            raise InvalidInputError(
                f"an EMA takes half_life_steps or decay, exactly one of them, not half_life_steps="
                f"{shorten(self.half_life_steps)} and decay={shorten(self.decay)}; write for example "
                f"'ema:half_life=500'"
            )
        if self.half_life_steps is not None:
            # Anything above 0; the upper bound also keeps integers too long for a float out.
            means = "a finite number of steps above 0 (at most 1e18), such as half_life=500"
            check_range("half_life", self.half_life_steps, low=5e-324, high=1e18, means=means)
        if self.decay is not None:
            means = "a number in [0, 1), such as decay=0.99"
            check_range("decay", self.decay, low=0, high=math.nextafter(1, 0), means=means)
        if self.init not in ("debias", "first"):
            raise InvalidInputError(f"init is {self.init!r}; it must be 'debias' or 'first'")
        self._check_warm_up()

    @property
    def spelling(self) -> str:
        """Such as ``ema:half_life=60,start_step=100``."""
        init = None if self.init == "debias" else self.init
        options = {"half_life": self.half_life_steps, "decay": self.decay, "start_step": self.start_step or None}
        return spell("ema", {**options, "init": init, "rampup": self.rampup, "warmup": self.warmup})

    def weight(self, *, n_averaged: int, step: int, prev_step: int | None) -> float:
        """See the class; computed with `expm1`, so that decays very near 1 keep their accuracy."""
        check_progress(self.start_step, n_averaged=n_averaged, step=step, prev_step=prev_step)
        if n_averaged == 0 or prev_step is None:
            return 1.0
        if self.decay is not None:
            return self._weight_per_fold(self.decay, n_averaged=n_averaged)
        begin, end = prev_step - self.start_step, step - self.start_step
        half_life = float(self.half_life_steps or 1)
        new = -math.expm1(log_left(half_life, self.rampup, begin=begin, end=end))
        if self.init == "first":
            return new
        return new / -math.expm1(log_left(half_life, self.rampup, begin=0, end=end))

    def _weight_per_fold(self, decay: float, *, n_averaged: int) -> float:
        if decay == 0:
            return 1.0
        new = 1.0 - decay
        if self.warmup is not None:
            new = max(new, (self.warmup - 1) / (self.warmup + n_averaged))
        if self.init == "first":
            return new
        return new / -math.expm1(log_left_of_zero(decay, self.warmup, num_folds=n_averaged + 1))

    def _check_warm_up(self) -> None:
        if self.rampup is not None:
            if self.half_life_steps is None:
                raise InvalidInputError(
                    "rampup goes with half_life; with a decay per fold write warmup=10 instead"
                )
            means = "a number from 1e-9 to 1000, such as rampup=0.05"
            check_range("rampup", self.rampup, low=1e-9, high=1000, means=means)
        if self.warmup is not None:
            if self.decay is None:
                raise InvalidInputError("warmup goes with decay; with a half-life write rampup=0.05 instead")
            means = "a whole number from 2 to 1000000, such as warmup=10"
            check_whole("warmup", self.warmup, low=2, high=1_000_000, means=means)


@dataclass(frozen=True)
class PowerEmaRule(_Lerp):
    """Power-function weights: a checkpoint's profile is ``t**gamma``, an average that grows with the run.

    Unlike an EMA its length is a fixed part of the run, `sigma_rel`: the standard deviation of the profile over
    the run's length. Snapshots of two such averages are enough to rebuild others (`wa_core.averaging.posthoc`).

    With ``t`` in steps since the start, a fold weighs ``1 - (t_prev / t)**(gamma + 1)``: the paper's
    ``beta(t) = (1 - 1/t)**(gamma + 1)``, which is for a gap of one step, over the gap that there is. It has no
    bias: nothing is left of what was before the start.

    Args:
        sigma_rel: relative to the run's length, above 0 and at most ``1 / sqrt(12)``, which is the plain mean.
        start_step: the first optimizer step that counts, >= 0.

    Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
    arXiv 2312.02696, section 3.1 and Algorithm 2.
    """

    sigma_rel: float
    start_step: int = 0

    def __post_init__(self) -> None:
        check_start_step(self.start_step)
        means = "a number above 0 and at most 0.288675 (1 / sqrt(12), the plain mean), such as sigma_rel=0.1"
        check_range("sigma_rel", self.sigma_rel, low=1e-9, high=1 / math.sqrt(12), means=means)

    @property
    def spelling(self) -> str:
        """Such as ``power:sigma_rel=0.1``."""
        return spell("power", {"sigma_rel": self.sigma_rel, "start_step": self.start_step or None})

    @cached_property
    def gamma(self) -> float:
        """The exponent: the root, at least 0, of ``sigma_rel**2 = (gamma + 1) / ((gamma + 2)**2 (gamma + 3))``.

        By Newton's method from ``1 / sigma_rel``, which lies above the root and where the curve is convex, so that
        every iterate falls towards it.
        """
        square, gamma = float(self.sigma_rel) ** 2, 1.0 / float(self.sigma_rel)
        while True:
            excess = square * (gamma + 2) ** 2 * (gamma + 3) - (gamma + 1)
            slope = square * (gamma + 2) * (3 * gamma + 8) - 1
            step = max(gamma - excess / slope, 0.0)
            if not step < gamma:
                return gamma
            gamma = step

    def weight(self, *, n_averaged: int, step: int, prev_step: int | None) -> float:
        """``1 - (t_prev / t)**(gamma + 1)``, computed so that it keeps its accuracy at small gaps."""
        check_progress(self.start_step, n_averaged=n_averaged, step=step, prev_step=prev_step)
        if n_averaged == 0 or prev_step is None or prev_step == self.start_step:
            return 1.0
        log_ratio = math.log1p((prev_step - step) / (step - self.start_step))
        return -math.expm1((self.gamma + 1) * log_ratio)


AnyRule = Rule | WindowRule


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


def parse_rule(text: str) -> AnyRule:
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
        raise InvalidInputError(f"{text!r}: there is no rule {name!r}{did_you_mean(name, _RULES)}; {_EXAMPLES}")
    if colon and not rest:
        raise InvalidInputError(f"{text!r}: nothing follows the colon; {_EXAMPLES}")
    rule, options = _RULES[name]
    values = read_options(text, rest, known=options) if rest else {}
    if name == "power" and "sigma_rel" not in values:
        raise InvalidInputError(f"{text!r}: a power-function average takes sigma_rel; write 'power:sigma_rel=0.1'")
    try:
        return rule(**values)
    except InvalidInputError as error:
        raise InvalidInputError(f"{text!r}: {error.message}") from error


def parse_run_rule(text: str) -> AnyRule:
    """`parse_rule` for who follows a run while it trains, and does not know how long it will be.

    Raises:
        InvalidInputError: as `parse_rule`; or it is a window over a fraction of the run (`needs_total_steps`).
    """
    rule = parse_rule(text)
    if isinstance(rule, WindowRule) and rule.last_fraction is not None:
        raise InvalidInputError(
            f"{text!r}: how long a run gets is known at its end; write 'window:last_steps=1000' or "
            f"'window:last=8', or average the files then: 'wa average … --rule {rule.spelling}'",
            code="needs_total_steps",
        )
    return rule


def require_lerp(rule: AnyRule) -> Rule:
    """The rule, if checkpoints can be folded under it one by one.

    Raises:
        InvalidInputError: it is a window; code `not_a_lerp_rule`.
    """
    if isinstance(rule, WindowRule):
        raise InvalidInputError(
            f"{rule.spelling!r}: a window cannot be folded checkpoint by checkpoint, as nothing could take an old "
            f"one out again; average the kept checkpoints, as 'wa average … --rule {rule.spelling}' does",
            code="not_a_lerp_rule",
        )
    return rule


_START = {"start_step": Option("start_step", "whole", "100")}
_EMA = {
    "half_life": Option("half_life_steps", "number", "500"),
    "decay": Option("decay", "number", "0.99"),
    **_START,
    "init": Option("init", "word", "first (or debias, as without it)"),
    "rampup": Option("rampup", "number", "0.05"),
    "warmup": Option("warmup", "whole", "10"),
}
_POWER = {"sigma_rel": Option("sigma_rel", "number", "0.1"), **_START}
_LAWA = {
    "last": Option("last", "whole", "8"),
    "last_steps": Option("last_steps", "whole", "1000"),
    "last_fraction": Option("last_fraction", "number", "0.2"),
    **_START,
}
_WINDOW = {**_LAWA, "shape": Option("shape", "word", "uniform (or linear, minus_sqrt, cosine)")}
_RULES: dict[str, tuple[Callable[..., AnyRule], dict[str, Option]]] = {
    "swa": (SwaRule, _START),
    "ema": (EmaRule, _EMA),
    "power": (PowerEmaRule, _POWER),
    "window": (WindowRule, _WINDOW),
    "lawa": (WindowRule, _LAWA),
}
