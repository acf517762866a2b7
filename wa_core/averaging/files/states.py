"""Shadow states made out of checkpoints and other shadow states, as a weighted sum, tile by tile.

A checkpoint holds tensors in its own dtypes, a state holds accumulators. Here both are seen as float64, summed,
and rounded once to what the new state's accumulators are; folding goes on from the result as from any state. It
knows files and weights; not how the weights were chosen, and no torch. The invariant: the result is what
`wa_core.averaging.streamed_shadow.StreamedShadow.restore` takes, with the coefficients that it was given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np

from wa_core.averaging.files.blocks import is_finite, narrow, widen
from wa_core.averaging.files.offline import MergeOptions, average_files
from wa_core.averaging.files.sources import specs_of
from wa_core.averaging.files.stored import StoredTensor
from wa_core.averaging.snapshot import STATE_KEY, ShadowDescription
from wa_core.averaging.tensor_policy import Policy
from wa_core.errors import IncompatibleError, InvalidInputError
from wa_core.header import DTYPE_BYTES
from wa_core.specs import TensorSpec, check_spec, format_dtype_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from wa_core.averaging.files.blocks import AccumulatorDtype
    from wa_core.averaging.files.output import Writer
    from wa_core.averaging.files.sources import Source
    from wa_core.averaging.rules import AnyRule, Rule

_SUM = "F64"


def sum_states(
    parts: Sequence[tuple[Source, float]],
    out: Writer,
    *,
    rule: Rule,
    dtype: AccumulatorDtype,
    coefficients: Mapping[int, float],
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the state of a shadow that holds ``Σ weight · part``.

    Every part is read twice: once for its digest, where one is recorded, and once to be summed. Normalisation
    statistics are pooled; whole numbers are those of the last part.

    Args:
        parts: open checkpoints and states with their weights, which sum to 1; the newest last. A weight may be 0.
        out: takes the state.
        rule: what will be folded on with.
        dtype: of the accumulators.
        coefficients: step -> coefficient of what is written: what the rule will take as folded already.
        on_progress: called with bytes read and bytes in all, from any thread; what it raises ends the sum.

    Raises:
        InvalidInputError: there are no parts, or the output cannot be written.
        IncompatibleError: parts of several architectures (`tensors_differ`, `shape_changed`, `dtype_changed`), or
            a sum that does not fit the accumulators (`overflow`).
        CorruptError: a part is damaged; nothing was written.
        StoreUnavailableError: a part cannot be reached; nothing was written.
    """
    if not parts:
        raise InvalidInputError("a state is summed from one part or more; keep checkpoints or states first")
    first = _Architecture.of(parts[0][0])
    for source, _ in parts[1:]:
        first.check(source)
    about = ShadowDescription(rule.spelling, dtype, first.specs, first.ties, dict(coefficients))
    average_files(
        [_AsSum(source, about) for source, _ in parts],
        cast("AnyRule", _Weights(tuple(weight for _, weight in parts))),  # a rule in all that a merge asks of one
        _StateWriter(out, about),
        steps=range(len(parts)),
        options=MergeOptions(num_threads=1, on_progress=on_progress),
    )


@dataclass(frozen=True, slots=True)
class _Architecture:
    """What the checkpoints behind a file look like."""

    specs: tuple[TensorSpec, ...]
    ties: Mapping[str, str]

    @classmethod
    def of(cls, source: Source) -> _Architecture:
        if STATE_KEY not in source.metadata:
            return cls(specs_of(source), source.ties)
        about = ShadowDescription.parse(source.metadata, rule=None)
        return cls(about.specs, about.ties)

    def check(self, source: Source) -> None:
        try:
            check_spec(self.specs, _Architecture.of(source).specs)
        except IncompatibleError as error:
            raise IncompatibleError(f"{source.name}: {error.message}", code=error.code) from None


@dataclass(frozen=True, slots=True)
class _Weights:
    """The rule that gives each part its weight, by its position."""

    weights: tuple[float, ...]
    spelling: str = "sum"

    def coefficients(self, steps: Sequence[int], *, total_steps: int | None = None) -> dict[int, float]:  # noqa: ARG002  a rule's signature
        return {position: self.weights[position] for position in steps}


class _AsSum:
    """A checkpoint or a state, seen as what is summed: float64, but for what keeps its latest value."""

    def __init__(self, inner: Source, about: ShadowDescription) -> None:
        self._inner = inner
        self.name, self.step, self.files = inner.name, None, inner.files
        self.size_bytes, self.is_remote, self.has_records = inner.size_bytes, inner.is_remote, inner.has_records
        self.metadata: Mapping[str, str] = {}
        self.ties: Mapping[str, str] = {}
        policies = about.policies
        self.tensors = {
            spec.name: _stored(spec, "float64" if policies[spec.name] is not Policy.LATEST else spec.dtype)
            for spec in about.specs
            if spec.name in policies
        }

    def read_into(self, name: str, begin: int, out: memoryview) -> None:
        """Fill `out` with a tensor's bytes, widened."""
        name, wanted = self._inner.ties.get(name, name), self.tensors[name].dtype
        found = self._inner.tensors[name]
        if found.dtype == wanted:
            self._inner.read_into(name, begin, out)
            return
        raw = np.empty(len(out) // DTYPE_BYTES[wanted] * found.item_bytes, np.uint8)
        self._inner.read_into(name, begin // DTYPE_BYTES[wanted] * found.item_bytes, raw.data)
        np.frombuffer(out, np.float64)[:] = widen(raw, found.dtype)

    def digests(self) -> dict[str, str]:
        """Of the files as they are."""
        return self._inner.digests()

    def close(self) -> None:
        """Nothing: whoever opened the file closes it."""


class _StateWriter:
    """In front of another writer: rounds sums to accumulators, and describes them as a state."""

    def __init__(self, writer: Writer, about: ShadowDescription) -> None:
        self._writer = writer
        self._texts = about.texts()
        self._tensors = {spec.name: _stored(spec, spec.dtype) for spec in about.stored}

    def begin(
        self,
        tensors: Sequence[StoredTensor],  # noqa: ARG002  the port's signature
        *,
        ties: Mapping[str, str],  # noqa: ARG002
        metadata: Mapping[str, str],  # noqa: ARG002
    ) -> None:
        """Make room for the accumulators, the widest first, as every state has them."""
        order = sorted(self._tensors.values(), key=lambda tensor: (-tensor.item_bytes, tensor.spec.name))
        self._writer.begin(order, ties={}, metadata=self._texts)

    def has(self, name: str, begin: int, size_bytes: int) -> bool:  # noqa: ARG002  the port's signature
        """Nothing: a sum that was killed begins anew."""
        return False

    def write(self, name: str, begin: int, data: memoryview) -> None:
        """Put whole elements, which begin at byte `begin` of the sum."""
        tensor = self._tensors[name]
        if tensor.dtype == "F32":
            raw = narrow(np.frombuffer(data, np.float64), tensor.dtype)
            if not is_finite(raw, tensor.dtype):
                raise IncompatibleError(
                    f"the sum of tensor {name!r} does not fit into float32; ask for float64 accumulators",
                    code="overflow",
                )
            begin, data = begin // DTYPE_BYTES[_SUM] * tensor.item_bytes, raw.data
        self._writer.write(name, begin, data)

    def commit(self, metadata: Mapping[str, str]) -> tuple[Path, ...]:  # noqa: ARG002  the port's signature
        """Make the state visible."""
        return self._writer.commit(self._texts)

    def abort(self) -> None:
        """Stop."""
        self._writer.abort()


def _stored(spec: TensorSpec, dtype: str) -> StoredTensor:
    name = format_dtype_name(dtype)
    return StoredTensor(replace(spec, dtype=dtype), name, math.prod(spec.shape) * DTYPE_BYTES[name])
