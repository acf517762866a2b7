"""Deletes what a run no longer needs: the planner decides (`wa_core.catalog.retention`), this looks, and acts.

Why this is safe without a lock, beside an averager that publishes, a zombie that wakes up, or a second sweeper:

- A generation names a state that was uploaded for it alone, or the state of the generation right before it.
  Numbers are created once, so whoever publishes generation n + 1 knew n as the newest; a zombie that builds on an
  older one finds its number taken. The state of the newest generation is never deleted, and those of older ones
  can be named by nobody any more. So a deleted state cannot come back.
- What may go stays free to go however the run goes on (`wa_core.catalog.retention.rewinds`), so a plan that is
  carried out late, twice or half does no more harm than one that is carried out at once.
- One thing that does not cover: somebody may ask to go back to a checkpoint, or add an average, at the very moment
  in which the policy lets checkpoints go. So the log and the newest generations are looked at again right before
  anything is deleted, and what was the newest checkpoint a moment ago is left alone for a while.
- Ages are told by the store's own clock alone: no machine's wrong clock makes anything look old.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.catalog.retention import Delete, Grace, Keep, plan
from wa_core.catalog.survey import Survey

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from wa_core.catalog.retention import Verdict
    from wa_core.clock import Clock
    from wa_core.store.base import ObjectInfo, ObjectStore

_BATCH = 100


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What a sweep decided, and what it did.

    Attributes:
        run_id: the run.
        sizes: the size in bytes of each object that was looked at, by key.
        verdicts: what was decided about each, by key.
        deleted: the keys that were deleted; none in a dry run.
    """

    run_id: str
    sizes: Mapping[str, int]
    verdicts: Mapping[str, Verdict]
    deleted: Sequence[str]

    @property
    def doomed(self) -> list[str]:
        """The keys that may go, whether or not they were deleted."""
        return [key for key, verdict in self.verdicts.items() if isinstance(verdict, Delete)]

    @property
    def freed_bytes(self) -> int:
        """The size of what was deleted."""
        return sum(self.sizes[key] for key in self.deleted)

    @property
    def is_settled(self) -> bool:
        """Whether another sweep would find nothing to do unless something happens to the run."""
        waits = any(isinstance(verdict, Keep) and verdict.is_temporary for verdict in self.verdicts.values())
        return not waits and len(self.deleted) == len(self.doomed)


class Sweeper:
    """Sweeps one run, again and again at the price of what is new.

    Args:
        store: the bucket.
        run_id: the run.
        clock: the time source of the run's log; ages do not depend on it.
        grace: how long things are left alone.
        depth: how many records of each average to read at most in one sweep; None for no limit.
        max_deletes: how many objects to delete at most in one sweep; None for no limit.

    Raises:
        RunNotFoundError: there is no such run.
    """

    def __init__(
        self,
        store: ObjectStore,
        run_id: str,
        *,
        clock: Clock,
        grace: Grace | None = None,
        depth: int | None = None,
        max_deletes: int | None = None,
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._grace = grace or Grace()
        self._max_deletes = max_deletes
        self._survey = Survey(store, run_id, clock=clock, depth=depth)

    @property
    def is_over(self) -> bool:
        """Whether the run had ended when it was last swept."""
        return self._survey.is_over

    def sweep(self, *, is_dry_run: bool = False, is_whole: bool = False) -> SweepReport:
        """Delete what may go, and say about everything why it is kept or goes.

        Args:
            is_dry_run: delete nothing.
            is_whole: speak of records too, which are never deleted.

        Raises:
            CorruptError: the run's log cannot be read; nothing is deleted.
            TransientError: the store is away; what was deleted is deleted, and the next sweep goes on.
        """
        now = fetch_store_time(self._store)
        objects, verdicts = self._plan(now, is_whole=is_whole)
        doomed = [info.key for info in objects if isinstance(verdicts[info.key], Delete)]
        deleted = [] if is_dry_run else self._delete(doomed[: self._max_deletes], now)
        return SweepReport(self._run_id, {info.key: info.size_bytes for info in objects}, verdicts, deleted)

    def _plan(self, now: datetime, *, is_whole: bool = False) -> tuple[list[ObjectInfo], dict[str, Verdict]]:
        found = self._survey.take(is_whole=is_whole)
        return found.objects, plan(found.picture, found.objects, now=now, grace=self._grace)

    def _delete(self, doomed: list[str], now: datetime) -> list[str]:
        """Delete what is still to go when the run is looked at again, a batch at a time."""
        deleted: list[str] = []
        still: set[str] | None = None
        left = iter(doomed)
        while batch := list(islice(left, _BATCH)):
            if self._survey.has_moved():
                _, verdicts = self._plan(now)
                still = {key for key, verdict in verdicts.items() if isinstance(verdict, Delete)}
            for key in batch:
                if still is None or key in still:
                    self._store.delete(key)
                    deleted.append(key)
        return deleted


def fetch_store_time(store: ObjectStore) -> datetime:
    """The time by the store's own clock, which is what the times of its objects are told by.

    Raises:
        TransientError: the store is away.
    """
    store.put(layout.CLOCK, b"")
    at = store.head(layout.CLOCK).modified_at
    assert at is not None, "every object has a time; only common prefixes have none"  # noqa: S101  the port's promise
    return at
