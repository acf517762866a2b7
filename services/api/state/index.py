"""The list of all runs, kept in memory, so that showing a page of it costs no request for each run.

Two short listings say which runs can have changed: a run's marker is in `active/` from its submission until its
last average is published, and another one in `queue/` while it waits. Only runs under way, and those whose markers
are others than before, are read again; the rest is looked through a few at a time, since markers are advice
(ADR 19). Everything here can be thrown away at any moment. Rows lag by a second or two while requests are many,
and by nothing while they are few. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_left, insort
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

import structlog

from services.api.answers.resources import run_resource
from services.api.state.budget import Budget
from services.api.state.patience import DEADLINE_S, StoreAwayError
from wa_core import layout
from wa_core.catalog.runs import list_run_ids
from wa_core.errors import WeightAveragingError
from wa_core.records import RunState

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from datetime import datetime

    from services.api.state.snapshots import RunSnapshot
    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

TICK_S = 1.0
MAX_LAG_S = 10.0  # what was seen before that is not shown: the store may be away
IDLE_AFTER_S = 60.0  # without a list asked for, nothing is kept up
_ALL_IDS_EVERY_S = 30.0
_READING_S = 0.9  # of each tick, half of it pauses
_MAX_READ_AHEAD = 2000  # of the newest runs; those before them are read when they are asked for
_NUM_ROTATED = 5  # rows that nothing says have changed, read again in each tick
_FEW = 16
_CHUNK = 32


@dataclass(frozen=True, slots=True)
class Marks:
    """What the markers say of a run: when its active marker was written, None without; and whether it waits."""

    active_at: datetime | None = None
    is_waiting: bool = False
    is_active: bool = False


NO_MARKS = Marks()
UNDATED_MARKS = Marks(is_waiting=True, is_active=True)  # of a run that was submitted here, just now


@dataclass(frozen=True)
class Row:
    """A run as lists show it. `marks` and `read_at` are of the moment before it was read."""

    run_id: str
    state: RunState
    recipe: str | None
    owner: str
    labels: Mapping[str, str]
    created_at: datetime
    body: bytes = field(repr=False)
    marks: Marks
    read_at: float

    @cached_property
    def etag(self) -> str:
        """The validator of `body`."""
        return f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'

    @property
    def is_over(self) -> bool:
        """Whether the run has ended."""
        return self.state.is_terminal

    @property
    def is_settled(self) -> bool:
        """Whether it changes only with its markers."""
        return self.is_over and not self.marks.is_active

    @property
    def waits(self) -> bool:
        """Whether it waits for a runner, and changes with its markers but for the reason."""
        return self.marks.is_waiting and self.state is RunState.QUEUED


@dataclass(frozen=True, slots=True)
class Query:
    """Which runs are wanted: in one of `states` (any, when empty), with `labels`, of `owner`, made in a time.

    The time begins with `created_after` and ends just before `created_before`.
    """

    states: Collection[RunState] = ()
    labels: frozenset[tuple[str, str]] = frozenset()
    owner: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None

    def may_match(self, row: Row) -> bool:
        """Whether what never changes about the run is as wanted."""
        return (
            (self.owner is None or self.owner == row.owner)
            and (not self.labels or self.labels <= row.labels.items())
            and (self.created_after is None or row.created_at >= self.created_after)
            and (self.created_before is None or row.created_at < self.created_before)
        )

    def matches(self, row: Row) -> bool:
        """Whether the run is wanted."""
        return (not self.states or row.state in self.states) and self.may_match(row)


class Index:
    """The rows of all runs. Methods may be called from several threads.

    Args:
        store: the bucket.
        read: reads runs side by side, and gives each to `keep`.
        clock: the time.
    """

    def __init__(
        self, store: ObjectStore, *, read: Callable[[Sequence[str]], Sequence[RunSnapshot]], clock: Clock
    ) -> None:
        self._store = store
        self._read = read
        self._clock = clock
        self._rows: dict[str, Row] = {}
        self._no_runs: set[str] = set()  # ids of what was never wholly created, or cannot be read
        self._ids: list[str] = []  # ascending
        self._marks: dict[str, Marks] = {}
        self._looked_at: float | None = None
        self._all_ids_at: float | None = None
        self._asked_at = clock.monotonic()
        self._budget = Budget(share=0.1, most_s=0.2, clock=clock)
        self._lock = threading.RLock()
        self._undated: list[str] = []
        self._looking, self._reading = threading.Lock(), threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def close(self) -> None:
        """Keep nothing up any more."""
        self._stopped.set()

    # -- what is known --------------------------------------------------------------------------------------

    def row(self, run_id: str) -> Row | None:
        """A run's row as last read, however long ago."""
        return self._rows.get(run_id)

    def marks_of(self, run_id: str) -> Marks:
        """What the markers said of a run when they were last looked at."""
        return self._marks.get(run_id, NO_MARKS)

    def keep(self, run: RunSnapshot, *, marks: Marks, read_at: float) -> Row:
        """The row of a run, kept unless a later one is known."""
        resource = run_resource(run)
        row = Row(
            run_id=resource.run_id,
            state=resource.state,
            recipe=resource.recipe,
            owner=resource.owner,
            labels=resource.labels,
            created_at=resource.created_at,
            body=resource.model_dump_json().encode(),
            marks=marks,
            read_at=read_at,
        )
        with self._lock:
            known = self._rows.get(row.run_id)
            if known is None or known.read_at <= read_at:
                self._rows[row.run_id] = row
            if marks == UNDATED_MARKS:
                self._undated.append(row.run_id)
            if known is None:
                self._add_id(row.run_id)
                self._no_runs.discard(row.run_id)
        return row

    def confirmed(self, run_id: str) -> Row | None:
        """A run's row, if a recent look at the markers says that it is still right; None if that is not known."""
        row = self._rows.get(run_id)
        if row is None or not (row.is_settled or row.waits) or self.marks_of(run_id) != row.marks:
            return None
        looked_at = self._looked_at
        is_recent = looked_at is not None and self._clock.monotonic() - looked_at < MAX_LAG_S
        return row if is_recent and looked_at is not None and looked_at >= row.read_at else None

    # -- pages ----------------------------------------------------------------------------------------------

    def recent_page(self, query: Query, *, before: str | None, limit: int) -> list[Row] | None:
        """Up to `limit` rows, newest first, from memory alone; None when the bucket should be asked."""
        self._asked_at = self._clock.monotonic()
        if self._looked_at is None or self._asked_at - self._looked_at > MAX_LAG_S or self._budget.take():
            return None
        self.wake()
        found: list[Row] = []
        for run_id in self._newest_first(before):
            row = self._rows.get(run_id)
            if row is None and run_id not in self._no_runs:
                return None
            if row is None or not query.matches(row):
                continue
            if self._is_doubtful(row) and self._asked_at - row.read_at > MAX_LAG_S and not row.waits:
                return None
            found.append(row)
            if len(found) == limit:
                break
        return found

    def page(self, query: Query, *, before: str | None, limit: int) -> list[Row]:
        """Up to `limit` rows, newest first, as the bucket has them now."""
        began = self._asked_at = self._clock.monotonic()
        try:
            self._look(since=began)
            found = list(islice(self._matching(query, before=before, since=began), limit))
        finally:
            self._budget.spent(self._clock.monotonic() - began)
        self.wake()
        return found

    def _matching(self, query: Query, *, before: str | None, since: float) -> Iterator[Row]:
        ids = iter(self._newest_first(before))
        while chunk := list(islice(ids, _CHUNK)):
            rows = [(run_id, self._rows.get(run_id)) for run_id in chunk]
            unread = [run_id for run_id, row in rows if row is None]
            doubtful = [
                row.run_id
                for _, row in rows
                if row and query.may_match(row) and self._is_doubtful(row, since=since)
            ]
            # Many that wait are believed to wait still; each of them would cost as much as one that trains.
            if len(doubtful) > _FEW:
                doubtful = [run_id for run_id in doubtful if not self._is_said_to_wait(run_id)]
            self._read_rows(unread + doubtful, since=since)
            found = (self._rows.get(run_id) for run_id in chunk)
            yield from (row for row in found if row is not None and query.matches(row))

    def _newest_first(self, before: str | None) -> list[str]:
        with self._lock:
            end = len(self._ids) if before is None else bisect_left(self._ids, before)
            return self._ids[:end][::-1]

    def _is_said_to_wait(self, run_id: str) -> bool:
        row = self._rows[run_id]
        return row.waits and row.marks == self.marks_of(run_id)

    def _is_doubtful(self, row: Row, *, since: float | None = None) -> bool:
        """Whether a row may have changed since it was read; with `since`, it need not be when read after that."""
        if since is not None and row.read_at >= since:
            return False
        return self.marks_of(row.run_id) != row.marks or not row.is_settled

    # -- keeping it up --------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Keep the rows up from now on, until nobody has asked for a while."""
        self._asked_at = self._clock.monotonic()
        with self._lock:
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(target=self._keep_up, name="index", daemon=True)
                self._thread.start()

    def _keep_up(self) -> None:
        is_away = False
        is_whole = False
        while not self._stopped.wait(TICK_S):
            with self._lock:
                if is_whole and self._clock.monotonic() - self._asked_at > IDLE_AFTER_S:
                    self._thread = None
                    return
            try:
                is_whole = self.tick()
                is_away = False
            except WeightAveragingError as error:
                if not is_away:
                    log.warning("index_waits", error=error.message, code=error.code)
                is_away = True
            except Exception:  # the outermost loop of a thread: requests look for themselves, and say why
                if not is_away:
                    log.exception("index_failed")
                is_away = True

    def tick(self) -> bool:
        """Look at the markers, and read what may have changed, for a part of a second; whether that was all."""
        began = self._clock.monotonic()
        self._look(since=began)
        pending = self._pending()
        while pending and self._clock.monotonic() - began < _READING_S:
            started = self._clock.monotonic()
            self._read_rows(pending[:1], since=began)
            pending = pending[1:]
            # Reading without a pause takes the interpreter from requests until they queue up (ADR 42).
            self._stopped.wait(self._clock.monotonic() - started)
        return not pending

    def _pending(self) -> list[str]:
        """What to read, the most needed first."""
        with self._lock:
            ids, rows = self._ids[::-1], dict(self._rows)
        unread = [run_id for run_id in ids[:_MAX_READ_AHEAD] if run_id not in rows]
        changed = [row.run_id for row in rows.values() if self.marks_of(row.run_id) != row.marks]
        rest = sorted(
            (row for row in rows.values() if self.marks_of(row.run_id) == row.marks), key=lambda r: r.read_at
        )
        live = [row.run_id for row in rest if not (row.is_settled or row.waits)]
        quiet = [row.run_id for row in rest if row.is_settled or row.waits]
        return changed + live + quiet[:_NUM_ROTATED] + unread

    def _read_rows(self, run_ids: Sequence[str], *, since: float) -> None:
        """Read those that nobody else has read after `since`."""
        if not self._reading.acquire(timeout=DEADLINE_S):
            raise StoreAwayError("other requests wait for its answer about the same runs")
        try:
            with self._lock:
                rows = {run_id: self._rows.get(run_id) for run_id in run_ids}
            wanted = [run_id for run_id, row in rows.items() if row is None or row.read_at < since]
            found = {run.spec.run_id for run in self._read(wanted)} if wanted else set()
            with self._lock:
                self._no_runs.update(run_id for run_id in wanted if run_id not in found)
        finally:
            self._reading.release()

    def _look(self, *, since: float) -> None:
        """Look at the markers, unless somebody has begun to after `since`."""
        if not self._looking.acquire(timeout=DEADLINE_S):
            raise StoreAwayError("other requests wait for its answer about all runs")
        try:
            if self._looked_at is None or self._looked_at < since:
                self._look_at_markers()
        finally:
            self._looking.release()

    def _look_at_markers(self) -> None:
        began = self._clock.monotonic()
        active = {layout.run_id_of(info.key): info.modified_at for info in self._store.list(layout.ACTIVE)}
        waiting = {layout.run_id_of(info.key) for info in self._store.list(layout.QUEUE)}
        is_due = self._all_ids_at is None or began - self._all_ids_at > _ALL_IDS_EVERY_S
        ids = list_run_ids(self._store) if is_due else []
        with self._lock:
            self._marks = {id_: Marks(at, id_ in waiting, is_active=True) for id_, at in active.items() if id_}
            self._looked_at = began
            self._all_ids_at = began if is_due else self._all_ids_at
            self._take_ids([*ids, *self._marks])
            self._date_marks()

    def _date_marks(self) -> None:
        """Runs submitted here are known before their markers were seen."""
        for run_id in self._undated:
            row, seen = self._rows[run_id], self.marks_of(run_id)
            if row.marks == UNDATED_MARKS and seen.is_waiting:
                self._rows[run_id] = replace(row, marks=seen)
        self._undated.clear()

    def _take_ids(self, ids: Sequence[str]) -> None:
        new = set(ids) - set(self._ids)
        if len(new) > _FEW:
            self._ids = sorted({*self._ids, *new})
        else:
            for run_id in new:
                self._add_id(run_id)

    def _add_id(self, run_id: str) -> None:
        at = bisect_left(self._ids, run_id)
        if self._ids[at : at + 1] != [run_id]:
            insort(self._ids, run_id)
