"""What an average needs so that a run can be rewound to any checkpoint that is kept.

After a rewind to S an averager takes the newest generation whose state can be read and whose folds all lie at or
before S, and folds every checkpoint from that generation's cursor to S. So for each kept S that state is needed,
and those checkpoints. Where all checkpoints since an earlier place that can be rewound to are kept for good, they
are enough, and no state is needed.

The invariant: what is needed for S does not change as the log and the generations grow (until S itself goes). So a
plan made from an older picture deletes nothing that a newer one relies on, however late it is carried out.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from wa_core.averaging.windows import WindowRule
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from wa_core.catalog.retention.path import Path
    from wa_core.catalog.retention.picture import AveragePicture, Generation


@dataclass(slots=True)
class Needs:
    """Log seq of a checkpoint, or key of a state -> log seq of the kept checkpoint that it is needed for."""

    checkpoints: dict[int, int] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)


def rewind_needs(average: AveragePicture, path: Path, *, states: Iterable[Generation]) -> Needs:
    """What `average` needs to be rewound to each of the path's targets.

    Args:
        average: the average.
        path: the surviving checkpoints.
        states: its generations on the path that can be started from.
    """
    counted = [
        seq for seq, step in path.steps.items() if average.rule.counts(step) and seq not in average.rejected
    ]
    stays = path.for_good & path.present
    # How many of the counted up to an index may go one day: a stretch without any can always be replayed.
    passing = [0, *accumulate(seq not in stays for seq in counted)]
    newest, replay, needs = _newest_by_last_fold(states), _Replay(average, path, counted), Needs()
    reached = 0
    for target in path.targets:
        until = bisect_right(counted, target)
        if passing[until] > passing[bisect_right(counted, reached)]:
            replay.add(needs, _at_or_before(newest, target), target=target)
        if target in stays:
            reached = target
    return needs


class _Replay:
    """Adds what folding from a state to a target takes; targets come in ascending order."""

    def __init__(self, average: AveragePicture, path: Path, counted: Sequence[int]) -> None:
        self._average = average
        self._path = path
        self._counted = counted
        self._state: Generation | None = None
        self._begun = self._is_broken = False
        self._until = 0

    def add(self, needs: Needs, state: Generation | None, *, target: int) -> None:
        if not self._begun or state != self._state:
            self._begin(needs, state, target=target)
        wanted = self._counted[self._until : bisect_right(self._counted, target)]
        self._until += len(wanted)
        # A gap means that the target was not kept before, and only a rewind has made it one of the last or best:
        # holding the rest would bring nothing back. What only seems to be missing must be held, though.
        self._is_broken |= self._average.is_complete and not self._path.present >= set(wanted)
        if self._is_broken:
            return
        if state is not None and state.shadow is not None:
            needs.states.setdefault(state.shadow, target)
        for seq in wanted:
            needs.checkpoints.setdefault(seq, target)

    def _begin(self, needs: Needs, state: Generation | None, *, target: int) -> None:
        self._begun, self._state, self._is_broken = True, state, False
        self._until = bisect_right(self._counted, state.cursor) if state else 0
        if isinstance(self._average.rule, WindowRule) and state is not None:
            for seq in self._window(self._average.rule, state.last_folded):
                needs.checkpoints.setdefault(seq, target)

    def _window(self, rule: WindowRule, last_folded: int) -> Iterable[int]:
        """What was in the window once `last_folded` was."""
        seqs = self._counted[: bisect_right(self._counted, last_folded)]
        seq_of = {self._path.steps[seq]: seq for seq in seqs}
        try:
            return [seq_of[step] for step in rule.coefficients(list(seq_of))]
        except InvalidInputError:
            return seqs  # steps that do not ascend: no window is known, so all of it


def _newest_by_last_fold(states: Iterable[Generation]) -> tuple[list[int], list[Generation]]:
    """For bisecting: last folds, ascending, and with each the newest generation up to it."""
    ordered = sorted(states, key=lambda state: (state.last_folded, state.number))
    newest: list[Generation] = []
    for state in ordered:
        newest.append(newest[-1] if newest and newest[-1].number > state.number else state)
    return [state.last_folded for state in ordered], newest


def _at_or_before(newest: tuple[list[int], list[Generation]], target: int) -> Generation | None:
    index = bisect_right(newest[0], target)
    return newest[1][index - 1] if index else None
