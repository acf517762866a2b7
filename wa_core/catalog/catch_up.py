"""How an average that is added to a run comes to hold what was before it: replayed, or rebuilt (ADR 14). Pure.

Where every checkpoint that its rule counts is kept, they are folded again, and the average is exact. Where some
are gone, it is summed from what is kept, checkpoints and the states of other averages, with the weights that
`wa_core.averaging.posthoc` finds; or refused. It knows records, keys and numbers; no store and no tensors. The
invariant: a plan names only files that are kept, on the run's surviving path, and says how far its result is from
the rule's average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wa_core.averaging.windows import WindowRule
from wa_core.catalog.rebuild import cannot_rebuild, weights_of

if TYPE_CHECKING:
    from wa_core.averaging.rules import AnyRule
    from wa_core.catalog.rebuild import Holdings, Rebuild
    from wa_core.records import FileRef


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
        from wa_core.catalog.rebuild_search import RebuildSearch  # numpy, which an API does not wait for

        return RebuildSearch(held, rule, counted, wanted).plan(missing)
    raise cannot_rebuild(
        f"a window is made from the checkpoints in it, and {len(missing)} of the {len(wanted)} that are in "
        f"{rule.spelling!r} now are not kept",
        missing,
        last=max(counted),
    )
