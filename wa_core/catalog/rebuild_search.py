"""Finds the parts that rebuild an average: few of what is kept, and nearly as near to it as all of it. Pure.

It knows coefficients, keys and records; the least squares are those of `wa_core.averaging.posthoc`. The invariant:
a rebuild that is returned is within the limits of `wa_core.catalog.rebuild`, and its last part is the newest of
all that is kept, from which whole numbers are taken.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.averaging.posthoc import Kept, plan_rebuild
from wa_core.averaging.rules import EmaRule, SwaRule
from wa_core.catalog.rebuild import MAX_NOISE_GAIN, MAX_PROFILE_ERROR, Rebuild, cannot_rebuild, weights_of
from wa_core.records import RebuiltPart, SetAside

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from wa_core.averaging.posthoc import RebuildPlan
    from wa_core.averaging.rules import AnyRule
    from wa_core.catalog.rebuild import Holdings
    from wa_core.errors import InvalidInputError
    from wa_core.records import CheckpointCommitted, FileRef

# So many files are looked at in all. Of those, as few are used as give an error below the first, or within the
# second of the smallest.
_MAX_CANDIDATES = 128
_GOOD_ERROR = 0.005
_NEARLY = 1.25
_NUM_PARTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class RebuildSearch:
    """The search for one average.

    Args:
        held: what there is.
        rule: of the average.
        counted: the checkpoints that it counts, by step.
        wanted: step -> coefficient of the average.
    """

    def __init__(
        self,
        held: Holdings,
        rule: AnyRule,
        counted: Mapping[int, CheckpointCommitted],
        wanted: Mapping[int, float],
    ) -> None:
        self._held = held
        self._rule = rule
        self._counted = counted
        self._wanted = wanted
        self._files: dict[str, FileRef] = {}
        self._groups = [group for group in (self._kept_checkpoints(), *self._kept_states()) if group]

    def plan(self, missing: Sequence[int]) -> Rebuild:
        """A rebuild nearly as near as can be, of few parts.

        Raises:
            InvalidInputError: none is good enough.
        """
        best = self._solve(self._candidates()) if self._groups else None
        if best is None or best.profile_error > MAX_PROFILE_ERROR:
            raise self._refusal(best, missing)
        return self._rebuild(self._with_fewer(best))

    def _candidates(self) -> list[Kept]:
        share = max(1, _MAX_CANDIDATES // len(self._groups))
        return [one for group in self._groups for one in _spread(group, share)]

    def _solve(self, kept: Sequence[Kept]) -> RebuildPlan:
        return plan_rebuild(kept, self._wanted, max_error=math.inf, max_noise_gain=MAX_NOISE_GAIN)

    def _with_fewer(self, best: RebuildPlan) -> RebuildPlan:
        """Each part is a file to read: the smallest number of those that matter most which does nearly as well."""

        def part_of(one: Kept) -> float:
            return abs(best.weights[one.name]) * math.hypot(*one.coefficients.values())

        used = sorted((one for one in self._candidates() if one.name in best.weights), key=part_of, reverse=True)
        enough = max(_GOOD_ERROR, best.profile_error * _NEARLY)
        numbers = [number for number in _NUM_PARTS if number < len(used)]
        chosen, low, high = best, 0, len(numbers)
        while low < high:
            middle = (low + high) // 2
            found = self._solve(used[: numbers[middle]])
            if found.profile_error <= enough:
                chosen, high = found, middle
            else:
                low = middle + 1
        return chosen

    def _kept_checkpoints(self) -> list[Kept]:
        """The newest first, as in all groups."""
        kept = []
        for step, entry in sorted(self._counted.items(), reverse=True):
            if self._held.has(entry):
                self._files[weights_of(entry).key] = weights_of(entry)
                kept.append(Kept.raw(weights_of(entry).key, step=step))
        return kept

    def _kept_states(self) -> Iterator[list[Kept]]:
        """By average."""
        sound = {entry.seq for entry in self._held.sound()}
        kept: dict[str, list[Kept]] = {}
        for state in sorted(self._held.states, key=lambda one: -(one.last_step or 0)):
            is_of_use = sound >= set(state.folded) and (
                not self._weighs_by_number or self._counted.keys() >= state.coefficients.keys()
            )
            if state.shadow is not None and is_of_use and state.shadow.key not in self._files:
                self._files[state.shadow.key] = state.shadow
                kept.setdefault(state.name, []).append(Kept(state.shadow.key, state.coefficients))
        yield from kept.values()

    @property
    def _weighs_by_number(self) -> bool:
        """Whether a fold's weight depends on how many were before it, so that no others may be among them."""
        return isinstance(self._rule, SwaRule) or (
            isinstance(self._rule, EmaRule) and self._rule.decay is not None
        )

    def _rebuild(self, plan: RebuildPlan) -> Rebuild:
        seqs = {entry.step: entry.seq for entry in self._held.sound()}
        inside = sorted({*self._counted, *plan.coefficients})
        return Rebuild(
            parts=tuple(
                RebuiltPart(file=self._files[name], weight=weight) for name, weight in self._in_order(plan.weights)
            ),
            coefficients={step: plan.coefficients.get(step, 0.0) for step in inside},
            folded=tuple(seqs[step] for step in inside),
            rejected=tuple(aside for _, aside in sorted(self._held.unsound.items())),
            skipped=tuple(self._skipped(frozenset(inside))),
            through=self._held.lineage[-1].seq,
            profile_error=plan.profile_error,
            noise_gain=plan.noise_gain,
        )

    def _in_order(self, weights: Mapping[str, float]) -> list[tuple[str, float]]:
        """By their newest steps; the last gives the whole numbers, so it is the newest of all that is kept."""
        newest = {kept.name: max(kept.coefficients) for group in self._groups for kept in group}
        last = max(newest, key=lambda name: (newest[name], layout.blob_of(name) is None))
        return sorted(({last: 0.0} | dict(weights)).items(), key=lambda part: (part[0] == last, newest[part[0]]))

    def _skipped(self, inside: frozenset[int]) -> Iterator[SetAside]:
        for entry in self._held.sound():
            if entry.step not in inside:
                reason = f"the rule {self._rule.spelling} starts at step {self._rule.start_step}"
                yield SetAside(seq=entry.seq, step=entry.step, code="before_start", message=reason)

    def _refusal(self, best: RebuildPlan | None, missing: Sequence[int]) -> InvalidInputError:
        found = "nothing is kept that it could be rebuilt from"
        if best is not None:
            found = (
                f"the best that can be rebuilt from the rest has profile error {best.profile_error:.3g} and noise "
                f"gain {best.noise_gain:.3g}, where {MAX_PROFILE_ERROR:g} and {MAX_NOISE_GAIN:g} are allowed"
            )
        return cannot_rebuild(
            f"{len(missing)} of the {len(self._wanted)} checkpoints that {self._rule.spelling!r} counts are not "
            f"kept, and {found}",
            missing,
            last=max(self._counted),
        )


def _spread(group: Sequence[Kept], number: int) -> list[Kept]:
    """So many of a group: half of them the newest, the rest evenly over the others, the oldest included."""
    if len(group) <= number:
        return list(group)
    num_newest = number - number // 2
    newest, others = group[:num_newest], group[num_newest:]
    return [*newest, *(others[pick * len(others) // (number // 2) - 1] for pick in range(1, number // 2 + 1))]
