"""Averages made out of averages: what snapshots say of themselves, and the weights that rebuild another average.

It joins `wa_core.averaging.posthoc` (coefficients) with the offline merge (files): the snapshots' weights are
handed to a merge as a rule of their own. It knows metadata and numbers; no tensors. The invariant: the rebuilt
file says which checkpoints it stands for, with their coefficients, so that it can be a snapshot itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wa_core.averaging.posthoc import Kept, plan_rebuild
from wa_core.averaging.snapshot import STATE_KEY
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from wa_core.averaging.files.output import Writer
    from wa_core.averaging.files.sources import Source
    from wa_core.averaging.files.stored import StoredTensor
    from wa_core.averaging.posthoc import RebuildPlan
    from wa_core.averaging.rules import AnyRule

COEFFICIENTS_KEY = "coefficients"


@dataclass(frozen=True)
class SnapshotWeights:
    """A rule that gives each source, by its position from 0 on, the weight that a rebuild has chosen."""

    spelling: str
    weights: tuple[float, ...]

    def coefficients(self, steps: Sequence[int], *, total_steps: int | None = None) -> dict[int, float]:  # noqa: ARG002  a rule's signature
        """Position -> weight; positions of weight 0 are left out."""
        return {step: self.weights[step] for step in steps if self.weights[step]}


def recorded_coefficients(metadata: Mapping[str, str]) -> dict[int, float] | None:
    """Step -> coefficient as an averaged file records them, or None for what is no average.

    Understood are the outputs of the offline merge, rebuilt ones included, and shadows with their state.
    """
    try:
        if COEFFICIENTS_KEY in metadata:
            pairs = json.loads(metadata[COEFFICIENTS_KEY])
        elif STATE_KEY in metadata:
            pairs = json.loads(metadata[STATE_KEY])["coefficients"]
        elif "sources" in metadata:
            pairs = [(use["step"], use["coefficient"]) for use in json.loads(metadata["sources"])]
        else:
            return None
        pairs = pairs.items() if isinstance(pairs, dict) else pairs
        return {int(step): float(value) for step, value in pairs}
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def plan_sources(
    sources: Sequence[Source], rule: AnyRule, *, total_steps: int | None = None, max_error: float
) -> tuple[RebuildPlan, SnapshotWeights]:
    """How to rebuild the average of `rule` over all the checkpoints that the snapshots stand for.

    Args:
        sources: snapshots and raw checkpoints; the newest last.
        rule: the average that is wanted.
        total_steps: the run's length, for rules that need it.
        max_error: the largest profile error to accept.

    Raises:
        InvalidInputError: a source records neither coefficients nor a step, or the rebuild would not be good
            enough (`cannot_rebuild`).
    """
    kept = [Kept(source.name, _vector(source)) for source in sources]
    steps = sorted({step for one in kept for step in one.coefficients})
    plan = plan_rebuild(kept, rule.coefficients(steps, total_steps=total_steps), max_error=max_error)
    weights = tuple(plan.weights.get(source.name, 0.0) for source in sources)
    return plan, SnapshotWeights(rule.spelling, weights)


def newest_last(sources: Sequence[Source]) -> list[Source]:
    """Sorted by the newest step that each stands for; what is not averaged is taken from the last one."""
    return sorted(sources, key=lambda source: max(_vector(source)))


def _vector(source: Source) -> dict[int, float]:
    if found := recorded_coefficients(source.metadata):
        return found
    if source.step is not None:
        return {source.step: 1.0}
    raise InvalidInputError(
        f"{source.name} does not say which checkpoints it is an average of, nor its own step, so nothing can be "
        f"rebuilt from it; use files that `wa average` or an averager wrote"
    )


class RebuildWriter:
    """In front of another writer: says of the output what it stands for, rather than how it was put together.

    Args:
        writer: takes the result.
        plan: the rebuild.
    """

    def __init__(self, writer: Writer, plan: RebuildPlan) -> None:
        self._writer = writer
        steps = sorted(plan.coefficients)
        self._texts = {
            COEFFICIENTS_KEY: json.dumps([[step, plan.coefficients[step]] for step in steps]),
            "first_step": str(steps[0]),
            "last_step": str(steps[-1]),
            "n_averaged": str(len(steps)),
            "profile_error": f"{plan.profile_error:.3g}",
            "noise_gain": f"{plan.noise_gain:.3g}",
        }

    def begin(
        self, tensors: Sequence[StoredTensor], *, ties: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        """Make room."""
        self._writer.begin(tensors, ties=ties, metadata=self._described(metadata))

    def has(self, name: str, begin: int, size_bytes: int) -> bool:
        """Whether a killed merge has written these bytes."""
        return self._writer.has(name, begin, size_bytes)

    def write(self, name: str, begin: int, data: memoryview) -> None:
        """Put `data` at byte `begin` of tensor `name`."""
        self._writer.write(name, begin, data)

    def commit(self, metadata: Mapping[str, str]) -> tuple[Path, ...]:
        """Make the output visible."""
        return self._writer.commit(self._described(metadata))

    def abort(self) -> None:
        """Stop."""
        self._writer.abort()

    def _described(self, metadata: Mapping[str, str]) -> dict[str, str]:
        # The positions of snapshots are no steps: `sources` keeps the snapshots' names and weights alone.
        uses = [
            {("weight" if key == "coefficient" else key): value for key, value in use.items() if key != "step"}
            for use in json.loads(metadata["sources"])
        ]
        return {**metadata, **self._texts, "sources": json.dumps(uses, separators=(",", ":"))}
