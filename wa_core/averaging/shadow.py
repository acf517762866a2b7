"""Shadow weights: one average's accumulators, by canonical tensor name.

It knows tensors and a rule; it does not know where checkpoints come from or where the average goes. The invariant:
`fold` checks everything before it changes anything, so a refused checkpoint leaves no trace, and folding is
deterministic: the same checkpoints in the same order, with or without `state` and `restore` in between, give the
same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wa_core.averaging.kernels import blend, new_accumulators, pool
from wa_core.averaging.rules import parse_rule, require_lerp
from wa_core.averaging.snapshot import ShadowDescription, accumulator_of, bad_shadow, decide_stored
from wa_core.averaging.tensor_policy import Policy, partner_of
from wa_core.errors import IncompatibleError, InvalidInputError, NoAverageYetError
from wa_core.file_layout import find_ties
from wa_core.specs import TensorSpec, check_spec
from wa_core.tensors import canonical_state_dict, check_finite, spec_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from wa_core.averaging.rules import Rule

# Tensors with fewer elements are put together before they are looked at.
_SMALL = 1 << 12


class ShadowWeights:
    """The running average of a sequence of checkpoints under a rule.

    Floating-point tensors are averaged in accumulators of `dtype` (float64 ones always in float64); BatchNorm's
    running means and variances are pooled, which gives the moments of the mixture; integer and bool tensors take
    the latest value (`wa_core.averaging.tensor_policy`).
    Tied tensors are folded once. Accumulators live on the device of the first checkpoint.

    Args:
        rule: how much each checkpoint counts; or its spelling, such as ``ema:half_life=500``.
        dtype: `torch.float32` or `torch.float64`; an average in less precision would stop moving.
        latest: shell patterns (``*.inv_freq``) of float tensors that keep their newest value.

    Raises:
        InvalidInputError: another dtype, or a window, which cannot be folded.
    """

    def __init__(
        self, rule: Rule | str, *, dtype: torch.dtype = torch.float32, latest: Iterable[str] = ()
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise InvalidInputError(f"accumulators must be torch.float32 or torch.float64, not {dtype}")
        self.rule = require_lerp(parse_rule(rule) if isinstance(rule, str) else rule)
        self.dtype = dtype
        self._latest = tuple(latest)
        self._tensors: dict[str, Tensor] = {}
        self._shares: Tensor
        self._adopt(specs=(), ties={}, coefficients={})

    @property
    def n_averaged(self) -> int:
        """How many checkpoints have been folded."""
        return len(self._steps)

    @property
    def last_step(self) -> int | None:
        """The step of the last fold, or None before the first."""
        return self._steps[-1] if self._steps else None

    def coefficients(self) -> dict[int, float]:
        """Step -> the part of that checkpoint in the average, in folding order; they sum to 1."""
        return dict(zip(self._steps, self._shares.tolist(), strict=True))

    @torch.no_grad()
    def fold(self, state_dict: Mapping[str, Tensor], *, step: int, check_finite: bool = True) -> bool:
        """Fold one checkpoint: ``shadow += weight * (checkpoint - shadow)``.

        Args:
            state_dict: dense tensors by name, with or without wrappers' prefixes; not modified, not kept.
            step: the optimizer step it was taken at.
            check_finite: refuse NaN and infinity, which takes one more pass over the checkpoint. False, for who
                has looked already: otherwise a single NaN stays in the average for good.

        Returns:
            Whether it was folded; False when the rule does not count `step`.

        Raises:
            InvalidInputError: no tensors, or `step` does not go forward.
            IncompatibleError: names, shapes or dtypes differ from the first checkpoint's, tied tensors have come
                apart, or a tensor is complex, quantised or sparse.
            CorruptError: NaN or infinity, unless `check_finite` is False.
        """
        if not self.rule.counts(step):
            return False
        weight = self.rule.weight(n_averaged=self.n_averaged, step=step, prev_step=self.last_step)
        if not 0.0 <= weight <= 1.0:
            raise InvalidInputError(f"a fold's weight must be in [0, 1], not {weight!r}; the rule is wrong")
        state = canonical_state_dict(state_dict)
        self._check(state)
        if check_finite:
            _require_finite(state)
        if not self._specs:
            self._start(state)
        else:
            self._blend(state, weight)
        self._shares = torch.cat([self._shares * (1.0 - weight), self._shares.new_tensor([weight])])
        self._steps.append(step)
        return True

    def value(self) -> dict[str, Tensor]:
        """The average in the checkpoints' names, shapes and dtypes, rounded once, as new tensors.

        Aliases of a tied tensor are one object.

        Raises:
            NoAverageYetError: nothing has been folded.
        """
        if not self._specs:
            raise NoAverageYetError("nothing has been folded yet; fold a checkpoint that the rule counts first")
        dtypes = {spec.name: _torch_dtype(spec.dtype) for spec in self._specs}
        found = {name: tensor.to(dtypes[name], copy=True) for name, tensor in self._tensors.items()}
        return {spec.name: found[self._ties.get(spec.name, spec.name)] for spec in self._specs}

    def state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Everything `restore` needs: tensors, and texts to keep beside them (such as a file's metadata).

        The tensors are the live accumulators, as in `Module.state_dict()`: write them before the next fold.

        Raises:
            NoAverageYetError: nothing has been folded.
        """
        if not self._specs:
            raise NoAverageYetError("nothing has been folded yet, so there is no state to keep")
        about = ShadowDescription(
            self.rule.spelling, _dtype_name(self.dtype), self._specs, self._ties, self.coefficients(), self._latest
        )
        return dict(self._tensors), about.texts()

    @classmethod
    def restore(cls, rule: Rule, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> ShadowWeights:
        """The shadow that `state` described; folding on gives the bits of a shadow that never stopped.

        Raises:
            CorruptError: code `bad_shadow`, when they are not a whole state of this rule.
        """
        kept = ShadowDescription.parse(metadata, rule=rule.spelling)
        if spec_of(tensors) != kept.stored:
            raise bad_shadow("its tensors are not those that its description names")
        shadow = cls(rule, dtype=_torch_dtype(kept.dtype), latest=kept.latest)
        shadow._adopt(specs=kept.specs, ties=dict(kept.ties), coefficients=kept.coefficients)
        shadow._tensors = new_accumulators(tensors, dtypes={name: one.dtype for name, one in tensors.items()})
        return shadow

    def _check(self, state: Mapping[str, Tensor]) -> None:
        if not state:
            raise InvalidInputError("a checkpoint without tensors cannot be folded; pass model.state_dict()")
        for name, tensor in state.items():
            if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided or tensor.is_meta:
                raise IncompatibleError(
                    f"tensor {name!r} is {tensor.dtype}, {tensor.layout}, on {tensor.device}; only dense real "
                    f"tensors can be averaged, convert it first",
                    code="unsupported_dtype",
                )
        if self._specs:
            # The usual checkpoint is as the first was; only another one is described in full.
            if {name: (tensor.dtype, tensor.shape) for name, tensor in state.items()} != self._layout:
                check_spec(self._specs, spec_of(state))
            self._check_ties(state)

    def _adopt(
        self, *, specs: tuple[TensorSpec, ...], ties: dict[str, str], coefficients: Mapping[int, float]
    ) -> None:
        policies = decide_stored(specs, ties=ties, latest=self._latest)
        self._averaged, self._means, self._kept = (
            [name for name, found in policies.items() if found is policy]
            for policy in (Policy.AVERAGE, Policy.POOLED_MEAN, Policy.LATEST)
        )
        self._policies = policies
        self._specs, self._ties = specs, ties
        self._layout = {spec.name: (_torch_dtype(spec.dtype), torch.Size(spec.shape)) for spec in specs}
        self._steps = list(coefficients)
        # A tensor, because every fold multiplies all of them.
        self._shares = torch.tensor(list(coefficients.values()), dtype=torch.float64)

    def _check_ties(self, state: Mapping[str, Tensor]) -> None:
        if not self._ties:
            return
        # A copied state dict may have lost its ties; that does no harm while the values are still the same.
        still_tied = find_ties(state)
        for alias, name in self._ties.items():
            is_tied = still_tied.get(alias, alias) == still_tied.get(name, name)
            if not is_tied and not torch.equal(state[alias], state[name]):
                raise IncompatibleError(
                    f"{alias!r} and {name!r} were one tensor in the first checkpoint and differ now; checkpoints "
                    f"of one run must keep their architecture. Start a new average",
                    code="ties_changed",
                )

    def _start(self, state: Mapping[str, Tensor]) -> None:
        specs, ties = spec_of(state), find_ties(state)
        self._adopt(specs=specs, ties=ties, coefficients={})
        dtypes = {
            spec.name: accumulator_of(spec.dtype, _dtype_name(self.dtype), policy=self._policies[spec.name])
            for spec in specs
            if spec.name in self._policies
        }
        self._tensors = new_accumulators(state, dtypes={name: _torch_dtype(one) for name, one in dtypes.items()})

    def _blend(self, state: Mapping[str, Tensor], weight: float) -> None:
        blend(
            [self._tensors[name] for name in self._averaged],
            [self._placed(name, state) for name in self._averaged],
            weight=weight,
        )
        if self._means:
            variances = [partner_of(name) for name in self._means]
            pool(
                *([self._tensors[name] for name in names] for names in (self._means, variances)),
                *(
                    [self._placed(name, state).to(self._tensors[name].dtype) for name in names]
                    for names in (self._means, variances)
                ),
                weight=weight,
            )
        if self._kept:
            kept = [self._tensors[name] for name in self._kept]
            torch._foreach_copy_(kept, [state[name] for name in self._kept])

    def _placed(self, name: str, state: Mapping[str, Tensor]) -> Tensor:
        # In the shadow's layout: strided kernels round otherwise.
        tensor, device = state[name], self._tensors[name].device
        return (tensor if tensor.device == device else tensor.to(device)).contiguous()


def _require_finite(state: Mapping[str, Tensor]) -> None:
    if not _is_surely_finite(state):
        check_finite(state)


def _is_surely_finite(state: Mapping[str, Tensor]) -> bool:
    """Whether all is finite at a glance: NaN and infinity survive in a sum of products, which costs little.

    False also where products overflow, or are not this cheap; then every value has to be looked at.
    """
    kinds: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for tensor in state.values():
        if tensor.dtype in (torch.float32, torch.float64):
            small, dots = kinds.setdefault((tensor.device, tensor.dtype), ([], []))
            flat = tensor.reshape(-1)
            if flat.numel() < _SMALL:
                small.append(flat)
            else:
                dots.append(_halves_product(flat))
        elif tensor.is_floating_point():
            return False
    return all(
        bool(torch.stack([*dots, torch.cat(small).sum()] if small else dots).isfinite().all())
        for small, dots in kinds.values()
    )


def _halves_product(flat: Tensor) -> Tensor:
    # Memory is read in two places at a time, which is faster than one sum.
    half = flat.numel() // 2
    return torch.dot(flat[: flat.numel() - half], flat[half:])


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise bad_shadow(f"{name!r} is no dtype")
    return dtype


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
