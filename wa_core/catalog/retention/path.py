"""The checkpoints of a run that survive, as those who need some of them see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from collections.abc import Set as AbstractSet


@dataclass(frozen=True, slots=True)
class Path:
    """The surviving checkpoints, by their log seqs.

    Attributes:
        steps: the step of each, in log order.
        present: those whose files are all there.
        targets: the kept ones that the run can be rewound to, ascending.
        for_good: those that every later plan will keep as well.
        is_over: whether the run has ended, so that nothing comes after them.
    """

    steps: Mapping[int, int]
    present: AbstractSet[int]
    targets: Sequence[int]
    for_good: AbstractSet[int]
    is_over: bool

    def holds(self, last_folded: int) -> bool:
        """Whether a state with this last fold (0: none) is on the path."""
        return not last_folded or last_folded in self.steps
