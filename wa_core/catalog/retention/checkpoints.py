"""Which checkpoints of a run are kept, and why: by the policy, or because something still needs them.

Knows what averages say that they need; not how they work that out. A checkpoint goes as a whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wa_core.catalog.history import lineage
from wa_core.catalog.retention.path import Path
from wa_core.catalog.retention.picture import Delete, Keep
from wa_core.catalog.retention.policy import kept_by_policy
from wa_core.records import AttemptStarted, CheckpointCommitted, ResumeRequested

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from wa_core.catalog.retention.blobs import AverageBlobs
    from wa_core.catalog.retention.picture import Grace, RunPicture, Verdict


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run: what the run's records say.
        ages: seconds since each object in the bucket was written, by key.
        grace: how long things are left alone.
    """

    def __init__(self, run: RunPicture, ages: Mapping[str, float], *, grace: Grace) -> None:
        self._run = run
        self._ages = ages
        self._grace = grace
        self._all = [entry for entry in run.entries if isinstance(entry, CheckpointCommitted)]
        self._lineage = lineage(run.entries)
        self._policy = kept_by_policy(self._lineage, run.policy, losses=run.losses)
        self.path = self._surviving()

    def verdicts(self, averages: Iterable[AverageBlobs]) -> dict[str, Verdict]:
        """The verdict on each file that a checkpoint's entry names."""
        averages = list(averages)
        behind = [found.average.name for found in averages if not found.has_left]
        reasons = {**self._needed(averages), **self._policy.reasons, **self._resumable()}
        verdicts: dict[str, Verdict] = {}
        for entry in self._all:
            verdict = self._verdict(entry, reasons, behind=behind)
            for ref in entry.files.values():
                # Of two entries that name one file, the one that keeps it wins.
                if not isinstance(verdicts.get(ref.key), Keep):
                    verdicts[ref.key] = verdict
        return verdicts

    def is_unreadable(self, attempt: int, step: int) -> bool:
        """Whether an entry of this attempt and step does not say which files are the checkpoint's."""
        return any((entry.attempt, entry.step) == (attempt, step) for entry in self._all if not entry.files)

    def _surviving(self) -> Path:
        present = frozenset(entry.seq for entry in self._lineage if self._is_present(entry))
        # An ended run cannot be rewound; but others may be rebuilt from the states at what is kept for good.
        kept = self._policy.for_good if self._run.is_over else {**self._policy.reasons, **self._resumable()}
        return Path(
            steps={entry.seq: entry.step for entry in self._lineage},
            present=present,
            targets=[entry.seq for entry in self._lineage if entry.seq in kept and entry.seq in present],
            for_good=self._policy.for_good,
            is_over=self._run.is_over,
        )

    def _verdict(
        self, entry: CheckpointCommitted, reasons: Mapping[int, str], *, behind: Sequence[str]
    ) -> Verdict:
        if (reason := reasons.get(entry.seq)) is not None:
            return Keep(reason)
        if entry.seq in self.path.steps:
            return Delete("every average has passed it, and nothing keeps it")
        if self._run.policy.keeps_all:
            return Keep("no policy lets checkpoints go")
        if behind:
            return Keep(f"abandoned, but average {behind[0]!r} has not gone back yet")
        return Delete("abandoned: the run went on from an earlier checkpoint")

    def _resumable(self) -> dict[int, str]:
        """Where an attempt may start: at the newest, at what just was the newest, or where a user asked."""
        if not self._lineage:
            return {}
        reasons = {}
        if not self._run.is_over:
            settled = [entry.seq for entry in self._lineage if self._age(entry) >= self._grace.settle_s]
            since = settled[-1] if settled else 0
            reasons = {entry.seq: "the newest, a moment ago" for entry in self._lineage if entry.seq >= since}
            reasons |= dict.fromkeys(self._asked_for(), "the run is to resume from it")
        return reasons | {self._lineage[-1].seq: "the newest; training resumes from it"}

    def _asked_for(self) -> Iterable[int]:
        """The checkpoint that a user wants the run to go on from, until an attempt has."""
        for entry in reversed(self._run.entries):
            if isinstance(entry, AttemptStarted):
                break
            if isinstance(entry, ResumeRequested) and entry.from_step is not None:
                return [known.seq for known in self._lineage if known.step == entry.from_step]
        return []

    def _needed(self, averages: Sequence[AverageBlobs]) -> dict[int, str]:
        """Log seq -> which average needs it, and what for."""
        reasons: dict[int, str] = {}
        for found in averages if not self._run.is_over else ():
            name = found.average.name
            for seq, target in found.needs.checkpoints.items():
                reasons[seq] = f"{name!r} needs it to go back to step {self.path.steps[target]}"
        for found in averages:
            reasons |= found.unpassed()
            reasons |= dict.fromkeys(found.average.window, f"inside the window of {found.average.name!r}")
        return reasons

    def _is_present(self, entry: CheckpointCommitted) -> bool:
        if entry.seq > self._run.listed_after:
            return True  # committed since the objects were listed
        return bool(entry.files) and all(ref.key in self._ages for ref in entry.files.values())

    def _age(self, entry: CheckpointCommitted) -> float:
        return min((self._ages.get(ref.key, float("inf")) for ref in entry.files.values()), default=float("inf"))
