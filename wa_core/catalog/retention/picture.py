"""What the planner knows of a run, and what it answers: frozen records, small whatever the run's length.

A picture may be older than the bucket, and may leave out old generations; `is_complete` says so. Both make the
planner keep more, never less.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wa_core.averaging.windows import WindowRule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wa_core.averaging.rules import AnyRule
    from wa_core.records import CheckpointPolicy, Entry


@dataclass(frozen=True, slots=True)
class Keep:
    """The object stays. `is_temporary`: only time has to pass before it may go."""

    reason: str
    is_temporary: bool = False


@dataclass(frozen=True, slots=True)
class Delete:
    """The object may go, now and in every later state of the run."""

    reason: str


Verdict = Keep | Delete


@dataclass(frozen=True, slots=True)
class Grace:
    """How long things are left alone, in seconds of the store's own clock.

    Attributes:
        orphan_s: a file that no record names; it may be on its way, and its record still to come.
        download_s: a served file that was superseded; somebody may be downloading it.
        settle_s: a checkpoint that the newest one has replaced as the place to resume from; a runner may just have
            chosen it.
    """

    orphan_s: float = 24 * 3600.0
    download_s: float = 3600.0
    settle_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation of an average, without its lists.

    An average never mixes branches, so its last fold says which path all of it is on. `last_folded` is 0 when
    nothing was folded yet, and `shadow` the key of the accumulators, if the rule has any.
    """

    number: int
    cursor: int
    last_folded: int
    shadow: str | None


@dataclass(frozen=True, slots=True)
class Served:
    """The keys of the files that users can download of one generation."""

    generation: int
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AveragePicture:
    """One average.

    Attributes:
        name: its name.
        rule: which checkpoints count, and whether they are folded or kept in a window.
        generations: those known, ascending by number.
        rejected: log seqs that its newest generation inside the lineage has set aside as faulty.
        window: log seqs inside the windows of its newest generations; empty for rules that fold.
        served: generations with files to download, ascending.
        best: the generation with the best held-out loss so far.
        is_complete: whether everything that its records name is known; if not, what nobody seems to name is kept.
    """

    name: str
    rule: AnyRule
    generations: Sequence[Generation] = ()
    rejected: frozenset[int] = frozenset()
    window: frozenset[int] = frozenset()
    served: Sequence[Served] = ()
    best: int | None = None
    is_complete: bool = True

    @property
    def is_window(self) -> bool:
        """Whether it is made from the checkpoints themselves, each time."""
        return isinstance(self.rule, WindowRule)


@dataclass(frozen=True, slots=True)
class RunPicture:
    """A run as its log and its averages' records tell it.

    `losses` are held-out losses of raw checkpoints by log seq, None while they have not all been read. Log entries
    up to seq `listed_after` were there before the objects were listed: what they name and is not listed is gone.
    """

    run_id: str
    policy: CheckpointPolicy
    entries: Sequence[Entry]
    listed_after: int
    averages: Sequence[AveragePicture] = ()
    losses: Mapping[int, float] | None = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether no attempt can start any more."""
        return bool(self.entries) and self.entries[-1].state.is_terminal
