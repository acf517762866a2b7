"""How an average that is added to a run comes to hold what was before it: replayed, or rebuilt (ADR 0014). Pure.

Where every checkpoint that its rule counts is kept, they are folded again, and the average is exact. Where some
are gone, it is summed from what is kept, checkpoints and the states of other averages, with the weights that
`wa_core.averaging.posthoc` finds; or refused. It knows records, keys and numbers; no store and no tensors. The
invariant: a plan names only files that are kept, on the run's surviving path, and says how far its result is from
the rule's average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.averaging.posthoc import Kept, plan_rebuild
from wa_core.averaging.rules import EmaRule, SwaRule
from wa_core.averaging.windows import WindowRule
from wa_core.errors import InvalidInputError
from wa_core.records import Rebuilt, RebuiltPart, SetAside

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from wa_core.averaging.posthoc import RebuildPlan
    from wa_core.averaging.rules import AnyRule
    from wa_core.records import AverageManifest, CheckpointCommitted, FileRef

#: A rebuild that is further from the wanted average, or louder, is refused.
MAX_PROFILE_ERROR = 0.05
MAX_NOISE_GAIN = 20.0
# So many files are looked at in all. Of those, as few are used as give an error below the first, or within the
# second of the smallest.
_MAX_CANDIDATES = 128
_GOOD_ERROR = 0.005
_NEARLY = 1.25
_NUM_PARTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What there is of a run.

    Attributes:
        lineage: the checkpoints on the surviving path, in log order.
        unsound: log seq -> why a checkpoint is rejected, whoever asks; all others have recorded weights.
        present: the keys of the files of checkpoints that are in the bucket.
        states: generations of averages whose state is in the bucket.
    """

    lineage: Sequence[CheckpointCommitted]
    unsound: Mapping[int, SetAside]
    present: frozenset[str]
    states: Sequence[AverageManifest]

    def sound(self) -> Iterator[CheckpointCommitted]:
        """The checkpoints that an average may hold."""
        return (entry for entry in self.lineage if entry.seq not in self.unsound)

    def has(self, entry: CheckpointCommitted) -> bool:
        """Whether the weights of a sound checkpoint are kept."""
        return weights_of(entry).key in self.present


@dataclass(frozen=True, slots=True)
class Replay:
    """Fold the checkpoints of these log seqs, and of what comes after; the average is exact."""

    seqs: tuple[int, ...]
    files: tuple[FileRef, ...]
    profile_error: float = 0.0
    noise_gain: float = 1.0

    @property
    def read_bytes(self) -> int:
        """How much will be read."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Sum these parts, and fold what comes after log seq `through` on top.

    `coefficients` are those of the sum, for every step that the rule counts (0 included) and whatever else is in
    it; `folded` are the log seqs behind them, in the same order.
    """

    parts: tuple[RebuiltPart, ...]
    coefficients: Mapping[int, float]
    folded: tuple[int, ...]
    rejected: tuple[SetAside, ...]
    skipped: tuple[SetAside, ...]
    through: int
    profile_error: float
    noise_gain: float

    @property
    def files(self) -> tuple[FileRef, ...]:
        """What is read."""
        return tuple(part.file for part in self.parts)

    @property
    def read_bytes(self) -> int:
        """How much will be read: each part once for its digest, and once to be summed."""
        return 2 * sum(file.size_bytes for file in self.files)

    def manifest_fields(self) -> dict[str, object]:
        """What the first generation says, apart from its identity and its state."""
        return {
            "cursor": self.through,
            "folded": list(self.folded),
            "coefficients": dict(self.coefficients),
            "rejected": list(self.rejected),
            "skipped": list(self.skipped),
            "rebuilt": Rebuilt(
                parts=list(self.parts),
                through=self.through,
                profile_error=self.profile_error,
                noise_gain=self.noise_gain,
            ),
        }


def plan_catch_up(held: Holdings, rule: AnyRule) -> Replay | Rebuild:
    """How the average of `rule` over the checkpoints so far can be made from what is kept.

    Raises:
        InvalidInputError: it cannot be made well enough (`cannot_rebuild`); the message says by how much, and what
            to ask for instead.
    """
    counted = {entry.step: entry for entry in held.sound() if rule.counts(entry.step)}
    wanted = rule.coefficients(list(counted))
    missing = [step for step in wanted if not held.has(counted[step])]
    if not missing:
        chosen = [counted[step] for step in wanted]
        return Replay(tuple(entry.seq for entry in chosen), tuple(map(weights_of, chosen)))
    if not isinstance(rule, WindowRule):
        return _Search(held, rule, counted, wanted).plan(missing)
    raise _cannot(
        f"a window is made from the checkpoints in it, and {len(missing)} of the {len(wanted)} that are in "
        f"{rule.spelling!r} now are not kept",
        missing,
        last=max(counted),
    )


def weights_of(entry: CheckpointCommitted) -> FileRef:
    """The weights of a sound checkpoint."""
    return entry.files[layout.MODEL_FILE]


class _Search:
    """The search for parts that rebuild one average.

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
        return _cannot(
            f"{len(missing)} of the {len(self._wanted)} checkpoints that {self._rule.spelling!r} counts are not "
            f"kept, and {found}",
            missing,
            last=max(self._counted),
        )


def _cannot(what: str, missing: Sequence[int], *, last: int) -> InvalidInputError:
    since = max(missing) + 1
    advice = f"count only what is kept, with start_step={since}" if since <= last else "wait for new checkpoints"
    return InvalidInputError(
        f"{what}; {advice}, or ask for an average nearer to those that the run has", code="cannot_rebuild"
    )


def _spread(group: Sequence[Kept], number: int) -> list[Kept]:
    """So many of a group: half of them the newest, the rest evenly over the others, the oldest included."""
    if len(group) <= number:
        return list(group)
    num_newest = number - number // 2
    newest, others = group[:num_newest], group[num_newest:]
    return [*newest, *(others[pick * len(others) // (number // 2) - 1] for pick in range(1, number // 2 + 1))]
