"""What a shadow says of itself beside its tensors, so that folding can go on in another process.

It knows names, texts and numbers; no tensors and no torch. The invariant: a description that was parsed is whole,
and describing it again gives the same text; two shadows with equal descriptions do the same with every tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wa_core.averaging.tensor_policy import Policy, decide_all, partner_of
from wa_core.errors import CorruptError, IncompatibleError
from wa_core.specs import TensorSpec, shorten

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

STATE_KEY = "shadow"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class ShadowDescription:
    """Of one shadow.

    `rule` is its spelling, `dtype` (``float32`` or ``float64``) what is accumulated in; `specs` and `ties` are
    those of the first checkpoint, `coefficients` the folds. `latest` are shell patterns of float tensors that keep
    their newest value.
    """

    rule: str
    dtype: str
    specs: tuple[TensorSpec, ...]
    ties: Mapping[str, str]
    coefficients: Mapping[int, float]
    latest: tuple[str, ...] = ()

    @property
    def policies(self) -> dict[str, Policy]:
        """What becomes of each stored tensor, by name; as `decide_stored` says."""
        return decide_stored(self.specs, ties=self.ties, latest=self.latest)

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """The accumulators, sorted by name; tied tensors once."""
        policies = self.policies
        return tuple(
            TensorSpec(spec.name, accumulator_of(spec.dtype, self.dtype, policy=policies[spec.name]), spec.shape)
            for spec in self.specs
            if spec.name in policies
        )

    def texts(self) -> dict[str, str]:
        """For a file's metadata."""
        about: dict[str, object] = {
            "format": _FORMAT,
            "rule": self.rule,
            "dtype": self.dtype,
            "coefficients": list(self.coefficients.items()),
            "specs": [[spec.name, spec.dtype, list(spec.shape)] for spec in self.specs],
            "ties": dict(self.ties),
        }
        if self.latest:
            about["latest"] = list(self.latest)
        return {STATE_KEY: json.dumps(about, sort_keys=True)}

    @classmethod
    def parse(cls, metadata: Mapping[str, str], *, rule: str | None) -> ShadowDescription:
        """Read `texts` back; `rule` None takes those of any.

        Raises:
            CorruptError: code `bad_shadow`, when it is not a whole description of a shadow of `rule`.
        """
        if STATE_KEY not in metadata:
            raise bad_shadow(f"it has no metadata entry {STATE_KEY!r}")
        try:
            about = json.loads(metadata[STATE_KEY])
            if about["format"] != _FORMAT or about["dtype"] not in ("float32", "float64"):
                raise bad_shadow(
                    f"it has format {about['format']!r} and dtype {about['dtype']!r}, which are unknown"
                )
            found = cls(
                rule=about["rule"],
                dtype=about["dtype"],
                specs=tuple(
                    TensorSpec(str(name), str(dtype), tuple(shape)) for name, dtype, shape in about["specs"]
                ),
                ties=dict(about["ties"]),
                coefficients={int(step): float(value) for step, value in about["coefficients"]},
                latest=tuple(map(str, about.get("latest", ()))),
            )
            decide_stored(found.specs, ties=found.ties, latest=found.latest)
        except IncompatibleError as error:
            raise bad_shadow(error.message) from None
        except (KeyError, TypeError, ValueError) as error:
            raise bad_shadow(f"its description cannot be read ({type(error).__name__}: {error})") from None
        if rule not in (None, found.rule):
            raise bad_shadow(f"it was made with the rule {found.rule!r}, not {rule!r}")
        return found


def decide_stored(
    specs: Iterable[TensorSpec], *, ties: Mapping[str, str], latest: Iterable[str] = ()
) -> dict[str, Policy]:
    """What a fold does with every tensor of a checkpoint that has a value of its own, by name.

    Args:
        specs: of all names, tied ones included.
        ties: alias -> name; aliases are left out.
        latest: as for `wa_core.averaging.tensor_policy.policy_of`.

    Raises:
        IncompatibleError: a tensor cannot be averaged (`unsupported_dtype`), or a pair of statistics does not
            belong to the same channels (`shape_changed`).
    """
    stored = {spec.name: spec for spec in specs if spec.name not in ties}
    decisions = decide_all({name: spec.dtype for name, spec in stored.items()}, latest=latest)
    refused = [
        f"{name!r} {stored[name]} ({decision.reason})"
        for name, decision in decisions.items()
        if decision.policy is Policy.REFUSE
    ]
    if refused:
        raise IncompatibleError(f"cannot be averaged: {shorten(refused)}", code="unsupported_dtype")
    policies = {name: decision.policy for name, decision in decisions.items()}
    for name, policy in policies.items():
        if policy is Policy.POOLED_MEAN:
            _check_pair(stored[name], stored[partner_of(name)], policies[partner_of(name)])
    return policies


def _check_pair(mean: TensorSpec, variance: TensorSpec, policy: Policy) -> None:
    if policy is not Policy.POOLED_VAR or mean.shape != variance.shape:
        raise IncompatibleError(
            f"{mean.name!r} {mean} and {variance.name!r} {variance} should be statistics of the same channels; "
            f"keep the newest values of both by a pattern for latest tensors",
            code="shape_changed",
        )


def accumulator_of(dtype: str, wanted: str, *, policy: Policy) -> str:
    """The dtype that tensors of `dtype` are accumulated in, when `wanted` is asked for."""
    # Never narrower than the checkpoint: float64 weights would lose digits, or their range, in float32.
    return dtype if policy is Policy.LATEST or dtype == "float64" else wanted


def bad_shadow(what: str) -> CorruptError:
    """The error for a state that cannot be folded on (code `bad_shadow`)."""
    return CorruptError(
        f"this is no shadow that can be folded on: {what}; fold again from the checkpoints", code="bad_shadow"
    )
