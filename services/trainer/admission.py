"""Whether a run may start now, and if not, what it waits for. Pure.

What is not known admits nobody: a run waits until the cluster has answered, and never fails for it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.trainer.failure import INSUFFICIENT_RESOURCES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from wa_core.records import RunRequest, Scaling

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

    def take(self, request: RunRequest, *, owner: str) -> None:
        """Count a run that trains."""
        self.runs_of[owner] += 1
        for name, amount in needs(request.scaling).items():
            self.taken[name] += amount

    def wait_of(self, request: RunRequest, *, owner: str) -> Wait | None:
        """What a run has to wait for, or None if it may start."""
        limit = self.max_runs_per_owner
        if limit is not None and self.runs_of[owner] >= limit:
            return Wait(OWNER_AT_LIMIT, f"{self.runs_of[owner]} runs of {owner} train already, and {limit} may")
        if self.totals is None:
            return Wait(CLUSTER_UNKNOWN, "the cluster has not said yet what it has; is Ray running?")
        wanted, totals = needs(request.scaling), self.totals
        if short := [name for name, amount in wanted.items() if amount > totals.get(name, 0)]:
            return Wait(INSUFFICIENT_RESOURCES, _told(request, wanted, short, have=totals, where="cluster has"))
        free = {name: totals.get(name, 0) - self.taken[name] for name in wanted}
        if short := [name for name, amount in wanted.items() if amount > free[name]]:
            return Wait(RESOURCES_BUSY, _told(request, wanted, short, have=free, where="cluster has free"))
        return None


def needs(scaling: Scaling) -> dict[str, int]:
    """What a run's workers need together, by Ray's names."""
    return {name: amount * scaling.num_workers for name, amount in needs_each(scaling).items()}


def needs_each(scaling: Scaling) -> dict[str, int]:
    """What each worker needs, by Ray's names."""
    return {"CPU": 1, "GPU": 1} if scaling.use_gpu else {"CPU": 1}


def _told(
    request: RunRequest, wanted: Mapping[str, int], short: Iterable[str], *, have: Mapping[str, float], where: str
) -> str:
    lacks = " and ".join(f"{wanted[name]} {name}s, and the {where} {have.get(name, 0):g}" for name in short)
    return f"{request.scaling.num_workers} workers need {lacks}; ask for fewer workers, or add nodes"
