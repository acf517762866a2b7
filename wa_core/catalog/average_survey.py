"""Reads from the bucket what the retention planner wants to know of one average.

The newest records are read first; older ones only while the bucket holds files that no record read so far names.
What has not been read, or cannot be, makes the picture incomplete, and then nothing goes for want of a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.averaging.rules import parse_rule
from wa_core.averaging.windows import WindowRule
from wa_core.catalog.retention import AveragePicture, Generation, Served
from wa_core.errors import CorruptError
from wa_core.records import HEADLINE_METRIC

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from collections.abc import Set as AbstractSet

    from wa_core.catalog.averages import Generations
    from wa_core.records import AssessmentRecord, AverageManifest, AverageRequest

_NUM_SPARES = 2  # generations on the path that must be known: the newest, and the one that stands in for it


@dataclass(frozen=True, slots=True)
class Wanted:
    """What there is to find out.

    Attributes:
        path: log seqs of the surviving checkpoints.
        is_over: whether the run has ended.
        windows: whether it matters what was in older windows.
        losses: whether every assessment has to be read.
    """

    path: frozenset[int]
    is_over: bool
    windows: bool
    losses: bool

    def is_inside(self, known: Generation) -> bool:
        """Whether a generation holds nothing of an abandoned branch."""
        return not known.last_folded or known.last_folded in self.path


class AverageSurvey:
    """One average's records. At most `depth` of each kind are read at a look; None for no limit."""

    def __init__(self, generations: Generations, request: AverageRequest, *, depth: int | None) -> None:
        self._name = request.name
        self._rule = parse_rule(request.rule)
        self._generations = generations
        self._depth = depth
        self._published = _Backlog()
        self._assessed = _Backlog()
        self._known: dict[int, Generation] = {}
        self._served: dict[int, Served] = {}
        self._measured: dict[int, tuple[int, float]] = {}
        self._manifests: dict[int, AverageManifest] = {}
        self._best: int | None = None
        self._is_opaque = False

    @property
    def are_losses_known(self) -> bool:
        """Whether every assessment has been read."""
        return self._assessed.is_empty

    def losses(self) -> Iterator[tuple[int, int, float]]:
        """(step, cursor of the generation, loss) of the raw checkpoints that were measured, the older first."""
        for number, (step, loss) in sorted(self._measured.items()):
            known = self._known.get(number) or self._read(number)
            if known is not None:
                yield step, known.cursor, loss

    def has_moved(self) -> bool:
        """Whether something was published since the last look."""
        return bool(self._generations.numbers(after=self._published.newest))

    def look(self, files: Mapping[str, str], wanted: Wanted) -> AveragePicture:
        """What its records say, given its files in the bucket (key -> name).

        Raises:
            TransientError: the store is away.
        """
        states = {key for key, name in files.items() if name == layout.SHADOW_FILE}
        self._read_generations(states, wanted)
        self._read_assessments(files.keys() - states, are_all_wanted=wanted.losses)
        generations = [known for _, known in sorted(self._known.items())]
        newest = self._newest_manifests(generations, wanted)
        is_window = isinstance(self._rule, WindowRule)
        return AveragePicture(
            name=self._name,
            rule=self._rule,
            generations=generations,
            rejected=frozenset(aside.seq for manifest in newest[-1:] for aside in manifest.rejected),
            window=frozenset(seq for manifest in newest for seq in manifest.folded if is_window),
            # With an assessment that cannot be read nobody knows which is the newest and which the best.
            served=[] if self._is_opaque else [served for _, served in sorted(self._served.items())],
            best=self._best,
            is_complete=self._is_complete(files.keys(), states, wanted),
        )

    def _is_complete(self, files: AbstractSet[str], states: AbstractSet[str], wanted: Wanted) -> bool:
        named = self._named()
        is_window = isinstance(self._rule, WindowRule)
        are_states_known = states <= named and not (is_window and wanted.windows)
        return (
            not self._is_opaque
            and (are_states_known or self._published.is_empty)
            and (files - states <= named or self._assessed.is_empty)
        )

    def _read_generations(self, states: AbstractSet[str], wanted: Wanted) -> None:
        self._published.extend(self._generations.numbers(after=self._published.newest))
        unknown = states - self._named()
        num_inside = sum(wanted.is_inside(known) for known in self._known.values())
        is_window = isinstance(self._rule, WindowRule)

        def is_wanted() -> bool:
            return bool(unknown) or num_inside < _NUM_SPARES or (is_window and wanted.windows)

        for number in self._published.take(is_wanted, at_most=self._depth):
            if (known := self._read(number)) is not None:
                unknown -= {known.shadow}
                num_inside += wanted.is_inside(known)

    def _read(self, number: int) -> Generation | None:
        try:
            manifest = self._generations.fetch(number)
        except CorruptError:
            self._is_opaque = True
            return None
        if number > self._published.newest - _NUM_SPARES:
            self._manifests[number] = manifest
        shadow = manifest.shadow.key if manifest.shadow else None
        known = Generation(number, manifest.cursor, max(manifest.folded, default=0), shadow)
        self._known[number] = known
        return known

    def _newest_manifests(self, generations: list[Generation], wanted: Wanted) -> list[AverageManifest]:
        """Of the generations inside the lineage the newest, and while the run goes on the one before it."""
        inside = [known.number for known in generations if wanted.is_inside(known)]
        kept = inside[-1:] if wanted.is_over else inside[-_NUM_SPARES:]
        self._manifests = {
            number: self._manifests.get(number) or self._generations.fetch(number) for number in kept
        }
        return list(self._manifests.values())

    def _read_assessments(self, files: AbstractSet[str], *, are_all_wanted: bool) -> None:
        self._assessed.extend(self._generations.assessed_numbers(after=self._assessed.newest))
        unknown = set(files - self._named())

        def is_wanted() -> bool:
            return bool(unknown) or are_all_wanted or self._assessed.newest not in self._served

        for number in self._assessed.take(is_wanted, at_most=self._depth):
            try:
                record = self._generations.fetch_assessment(number)
            except CorruptError:
                self._is_opaque = True
                continue
            if record is not None:
                self._remember(record)
                unknown -= {ref.key for ref in record.files.values()}

    def _remember(self, record: AssessmentRecord) -> None:
        number, raw = record.generation, record.assessment.raw
        self._served[number] = Served(number, tuple(ref.key for ref in record.files.values()))
        if number == self._assessed.newest:
            self._best = record.best
        if raw is not None and HEADLINE_METRIC in raw.metrics:
            self._measured[number] = (raw.step, raw.metrics[HEADLINE_METRIC])

    def _named(self) -> set[str]:
        """The keys that the records read so far name."""
        served = {key for found in self._served.values() for key in found.files}
        return served | {known.shadow for known in self._known.values() if known.shadow}


class _Backlog:
    """Numbered records of which the newest are read first, and older ones only when they are wanted."""

    def __init__(self) -> None:
        self.newest = 0
        self._unread: list[int] = []

    @property
    def is_empty(self) -> bool:
        """Whether all have been read."""
        return not self._unread

    def extend(self, numbers: list[int]) -> None:
        """Add those that have come since, ascending."""
        self._unread += numbers
        self.newest = max(self.newest, *numbers, 0)

    def take(self, is_wanted: Callable[[], bool], *, at_most: int | None) -> Iterator[int]:
        """The newest unread ones, for as long as more are wanted."""
        left = len(self._unread) if at_most is None else at_most
        while self._unread and left and is_wanted():
            left -= 1
            yield self._unread.pop()
