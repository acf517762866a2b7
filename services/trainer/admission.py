"""Whether a run may start now, and if not, what it waits for. Pure.

What is not known admits nobody: a run waits until the cluster has answered, and never fails for it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.trainer.failure import INSUFFICIENT_RESOURCES
from wa_core.records import AttemptStarted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wa_core.records import LogEntry, RunRequest, Scaling

CLUSTER_UNKNOWN = "cluster_unknown"
RESOURCES_BUSY = "resources_busy"
OWNER_AT_LIMIT = "owner_at_limit"


@dataclass(frozen=True, slots=True)
class Wait:
    """What a run waits for: a stable `reason`, and a `message` for people."""

    reason: str
    message: str

    @property
    def holds_up_others(self) -> bool:
        """Whether those behind it wait as well, so that small runs do not keep a large one out for ever."""
        return self.reason in {RESOURCES_BUSY, CLUSTER_UNKNOWN}


@dataclass(frozen=True, slots=True)
class Room:
    """What there is for runs, and who has taken of it.

    `totals` are the cluster's resources by name, None while they are not known.
    """

    totals: Mapping[str, float] | None
    max_runs_per_owner: int | None = None
    taken: Counter[str] = field(default_factory=Counter)
    runs_of: Counter[str] = field(default_factory=Counter)

    def take(self, scaling: Scaling, *, owner: str) -> None:
        """Count a run that trains with `num_workers` of `scaling`."""
        self.runs_of[owner] += 1
        for name, amount in needs(scaling).items():
            self.taken[name] += amount

    def fit(self, scaling: Scaling) -> Scaling:
        """What a run that need not wait trains with: as many workers as there is room for."""
        free = [(self._free(name), each) for name, each in needs_each(scaling).items()]
        num_workers = int(min(scaling.num_workers, *(amount / each for amount, each in free)))
        return fixed(scaling, max(scaling.fewest, num_workers))

    def wait_of(self, request: RunRequest, *, owner: str) -> Wait | None:
        """What a run has to wait for, or None if it may start."""
        limit = self.max_runs_per_owner
        if limit is not None and self.runs_of[owner] >= limit:
            return Wait(OWNER_AT_LIMIT, f"{self.runs_of[owner]} runs of {owner} train already, and {limit} may")
        if self.totals is None:
            return Wait(CLUSTER_UNKNOWN, "the cluster has not said yet what it has; is Ray running?")
        fewest = fixed(request.scaling, request.scaling.fewest)
        if lack := lack_of(fewest, self.totals, where="cluster has"):
            return Wait(INSUFFICIENT_RESOURCES, f"{lack}; ask for fewer workers, or add nodes")
        free = {name: self._free(name) for name in needs_each(fewest)}
        if lack := lack_of(fewest, free, where="cluster has free"):
            return Wait(RESOURCES_BUSY, f"{lack}; ask for fewer workers, or add nodes")
        return None

    def _free(self, name: str) -> float:
        return (self.totals or {}).get(name, 0) - self.taken[name]


def fixed(scaling: Scaling, num_workers: int) -> Scaling:
    """The same with so many workers, no fewer and no more."""
    return scaling.model_copy(update={"num_workers": num_workers, "min_workers": None})


def scaling_of(request: RunRequest, entries: Sequence[LogEntry]) -> Scaling:
    """What the newest attempt in a run's log trains with."""
    start = next((entry for entry in reversed(entries) if isinstance(entry, AttemptStarted)), None)
    num_workers = start.num_workers if start is not None else None
    return fixed(request.scaling, num_workers or request.scaling.num_workers)


def lack_of(scaling: Scaling, have: Mapping[str, float], *, where: str) -> str | None:
    """What is missing for `num_workers` of `scaling`, in words; None when nothing is."""
    wanted = needs(scaling)
    if not (short := [name for name, amount in wanted.items() if amount > have.get(name, 0)]):
        return None
    lacks = " and ".join(f"{wanted[name]} {name}s, and the {where} {have.get(name, 0):g}" for name in short)
    return f"{scaling.num_workers} workers need {lacks}"


def needs(scaling: Scaling) -> dict[str, int]:
    """What a run's workers need together, by Ray's names."""
    return {name: amount * scaling.num_workers for name, amount in needs_each(scaling).items()}


def needs_each(scaling: Scaling) -> dict[str, int]:
    """What each worker needs, by Ray's names."""
    return {"CPU": 1, "GPU": 1} if scaling.use_gpu else {"CPU": 1}
