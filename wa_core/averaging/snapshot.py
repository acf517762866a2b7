"""What a shadow says of itself beside its tensors, so that folding can go on in another process.

It knows texts and numbers; no tensors and no torch. The invariant: a description that was parsed is whole, and
describing it again gives the same text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wa_core.errors import CorruptError
from wa_core.specs import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

STATE_KEY = "shadow"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class ShadowDescription:
    """Of one shadow: its rule, accumulator dtype (``float32`` or ``float64``), checkpoints' specs, ties, folds."""

    rule: str
    dtype: str
    specs: tuple[TensorSpec, ...]
    ties: Mapping[str, str]
    coefficients: Mapping[int, float]

    @property
    def stored(self) -> tuple[TensorSpec, ...]:
        """The accumulators, sorted by name; tied tensors once."""
        return tuple(
            TensorSpec(spec.name, accumulator_of(spec.dtype, self.dtype), spec.shape)
            for spec in self.specs
            if spec.name not in self.ties
        )

    def texts(self) -> dict[str, str]:
        """For a file's metadata."""
        about = {
            "format": _FORMAT,
            "rule": self.rule,
            "dtype": self.dtype,
            "coefficients": list(self.coefficients.items()),
            "specs": [[spec.name, spec.dtype, list(spec.shape)] for spec in self.specs],
            "ties": dict(self.ties),
        }
        return {STATE_KEY: json.dumps(about, sort_keys=True)}

    @classmethod
    def parse(cls, metadata: Mapping[str, str], *, rule: str) -> ShadowDescription:
        """Read `texts` back.

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
            )
        except (KeyError, TypeError, ValueError) as error:
            raise bad_shadow(f"its description cannot be read ({type(error).__name__}: {error})") from None
        if found.rule != rule:
            raise bad_shadow(f"it was made with the rule {found.rule!r}, not {rule!r}")
        return found


def is_averaged(dtype: str) -> bool:
    """Whether tensors of this dtype, by torch's name, are averaged; the others take the latest value."""
    return dtype.startswith(("float", "bfloat"))


def accumulator_of(dtype: str, wanted: str) -> str:
    """The dtype that tensors of `dtype` are accumulated in, when `wanted` is asked for."""
    # Never narrower than the checkpoint: float64 weights would lose digits, or their range, in float32.
    return (wanted if dtype != "float64" else "float64") if is_averaged(dtype) else dtype


def bad_shadow(what: str) -> CorruptError:
    """The error for a state that cannot be folded on (code `bad_shadow`)."""
    return CorruptError(
        f"this is no shadow that can be folded on: {what}; fold again from the checkpoints", code="bad_shadow"
    )
