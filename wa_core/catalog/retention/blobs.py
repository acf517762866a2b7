"""Which files of one average are kept, and which checkpoints it still needs.

Two kinds of file: states (accumulators), which folding goes on from, and served files, which users download.
"""

from __future__ import annotations

import math
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from wa_core.averaging.rules import PowerEmaRule
from wa_core.catalog.retention.picture import Delete, Keep
from wa_core.catalog.retention.rewinds import rewind_needs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wa_core.catalog.retention.path import Path
    from wa_core.catalog.retention.picture import AveragePicture, Generation, Grace, Served, Verdict
    from wa_core.catalog.retention.rewinds import Needs


class AverageBlobs:
    """One average's files, judged.

    Args:
        average: what its records say.
        path: the run's surviving checkpoints.
        ages: seconds since each object in the bucket was written, by key.
        every_steps: how often a state of a power-function average is kept as a snapshot; None for never.
        beginner: an average of the run that has no generation yet, and may be rebuilt from this one's states.
        grace: how long things are left alone.
    """

    def __init__(
        self,
        average: AveragePicture,
        path: Path,
        ages: Mapping[str, float],
        *,
        every_steps: int | None,
        beginner: str | None,
        grace: Grace,
    ) -> None:
        self.average = average
        self._path = path
        self._ages = ages
        self._every_steps = every_steps
        self._beginner = beginner
        self._grace = grace

    @property
    def has_left(self) -> bool:
        """Whether its newest generation holds nothing of an abandoned branch."""
        return not self.average.generations or self._is_inside(self.average.generations[-1])

    @cached_property
    def needs(self) -> Needs:
        """What it needs for going back to each checkpoint that is kept."""
        return rewind_needs(self.average, self._path, states=self._states)

    def unpassed(self) -> dict[int, str]:
        """Log seqs of the checkpoints that its newest generations have not passed -> why they are needed."""
        newest, spare = self._cursors
        name, rule, rejected = self.average.name, self.average.rule, self.average.rejected
        return {
            seq: f"average {name!r} has not passed it" if seq > newest else f"{name!r} could lose its newest state"
            for seq, step in self._path.steps.items()
            if seq > newest or (seq > spare and rule.counts(step) and seq not in rejected)
        }

    def verdicts(self) -> dict[str, Verdict]:
        """The verdict on each file that a record names."""
        return self._state_verdicts() | self._served_verdicts()

    @cached_property
    def _inside(self) -> list[Generation]:
        return [known for known in self.average.generations if self._is_inside(known)]

    @cached_property
    def _states(self) -> list[Generation]:
        """The generations that can be started from, ascending; those without a fold are like none at all."""
        is_window = self.average.is_window
        return [one for one in self._inside if one.last_folded and (is_window or one.shadow in self._ages)]

    @cached_property
    def _spares(self) -> list[Generation]:
        """The newest generation with a state, and the newest before it with another one."""
        if not self._states:
            return []
        newest = self._states[-1]
        others = [
            one for one in self._states if (one.shadow, one.last_folded) != (newest.shadow, newest.last_folded)
        ]
        return [newest, *others[-1:]]

    @property
    def _cursors(self) -> tuple[int, int]:
        """Through where everything is in the newest generation, and in the one that stands in should it be lost.

        Once the run is over, nothing stands in: what is left is what the policy keeps.
        """
        newest = self._inside[-1] if self._inside else None
        if newest is None or (newest.last_folded and self._states[-1:] != [newest]):
            return (0, 0)
        if self._path.is_over:
            return (newest.cursor, newest.cursor)
        return (newest.cursor, self._spares[1].cursor if len(self._spares) > 1 else 0)

    def _is_inside(self, known: Generation) -> bool:
        return self._path.holds(known.last_folded)

    def _state_verdicts(self) -> dict[str, Verdict]:
        kept = self._needed_states()
        verdicts: dict[str, Verdict] = {}
        for known in self.average.generations:
            if known.shadow is None:
                continue
            if (reason := kept.get(known.shadow)) is not None:
                verdicts[known.shadow] = Keep(reason)
            elif self._is_inside(known):
                verdicts[known.shadow] = Delete(f"state of generation {known.number}, which nothing goes back to")
            else:
                verdicts[known.shadow] = Delete(f"state of generation {known.number}, of an abandoned branch")
        return verdicts

    def _needed_states(self) -> dict[str | None, str]:
        steps = self._path.steps
        kept: dict[str | None, str] = {}
        if self._beginner is not None:
            reason = f"average {self._beginner!r} has not begun, and may be rebuilt from it"
            kept = dict.fromkeys((known.shadow for known in self._states), reason)
        kept |= {
            known.shadow: f"snapshot of step {steps[known.last_folded]}, to rebuild other averages from"
            for known in self._snapshots()
        }
        kept |= {
            key: f"state to go back to step {steps[target]} from" for key, target in self.needs.states.items()
        }
        kept |= {known.shadow: f"newest states: generation {known.number}" for known in reversed(self._spares)}
        newest = self.average.generations[-1] if self.average.generations else None
        return kept | ({newest.shadow: f"state of the newest generation, {newest.number}"} if newest else {})

    def _snapshots(self) -> list[Generation]:
        """Of a power-function average the first state at or after each multiple of `keep_every_steps`."""
        if self._every_steps is None or not isinstance(self.average.rule, PowerEmaRule):
            return []
        steps = self._path.steps
        intervals = [0, *(steps[known.last_folded] // self._every_steps for known in self._states)]
        return [
            known for known, (before, now) in zip(self._states, pairwise(intervals), strict=True) if now > before
        ]

    def _served_verdicts(self) -> dict[str, Verdict]:
        verdicts: dict[str, Verdict] = {}
        superseded = self._superseded_s()
        for served in self.average.served:
            verdict = self._served_verdict(served, superseded_s=superseded[served.generation])
            verdicts |= dict.fromkeys(served.files, verdict)
        return verdicts

    def _served_verdict(self, served: Served, *, superseded_s: float) -> Verdict:
        number = served.generation
        if number == self.average.best:
            return Keep(f"served: generation {number} is the best")
        if number in {self.average.served[-1].generation, self._newest_served_inside}:
            return Keep(f"served: generation {number} is the newest")
        if superseded_s < self._grace.download_s:
            since = f"{superseded_s / 60:.0f} min ago"
            return Keep(f"somebody may be downloading generation {number}: superseded {since}", is_temporary=True)
        return Delete(f"served files of generation {number}, superseded and not the best")

    @cached_property
    def _newest_served_inside(self) -> int | None:
        inside = {known.number for known in self._inside}
        found = [served.generation for served in self.average.served if served.generation in inside]
        return found[-1] if found else None

    def _superseded_s(self) -> dict[int, float]:
        """For how long later files have been there, by generation; the record follows its files at once."""
        since = {self.average.served[-1].generation: 0.0} if self.average.served else {}
        for served, later in pairwise(self.average.served):
            found = [self._ages[key] for key in later.files if key in self._ages]
            since[served.generation] = min(found, default=math.inf)
        return since
