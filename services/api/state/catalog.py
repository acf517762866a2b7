"""What the API knows of runs, read from the bucket and kept only to read less of it again.

Everything here can be thrown away at any moment: logs grow by appending, specs and generations never change, so
a cache only ever lags. Every look at a run asks the bucket what is new, until looks take up too much of the time:
then what was seen a moment ago must do (`services.api.state.budget`). An API replica holds no state.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import structlog
from pydantic import ValidationError

from services.api.answers.resources import is_averaging_due
from services.api.asked.keys import KeysInUse
from services.api.state.attendance import Attendance
from services.api.state.budget import Budget
from services.api.state.index import MAX_LAG_S, UNDATED_MARKS, Index
from services.api.state.kept import Kept
from services.api.state.patience import DEADLINE_S, StoreAwayError
from services.api.state.snapshots import AverageSnapshot, RunSnapshot
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.catalog.holdings import fetch_holdings
from wa_core.catalog.runs import RunLog, add_average, fetch_spec, requested_averages
from wa_core.errors import AverageNotFoundError, CorruptError, ObjectNotFoundError, RunNotFoundError
from wa_core.records import AVERAGER, WAITING, Entry, Heartbeat, RunSpec, RunState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from services.api.state.index import Row
    from wa_core.catalog.jobs import AttemptT, Job, Jobs, RecordT, ResultT
    from wa_core.catalog.rebuild import Holdings
    from wa_core.clock import Clock
    from wa_core.records import AssessmentRecord, AverageManifest, AverageRequest, KeyedSubmission
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

K = TypeVar("K")
V = TypeVar("V")

MAX_RUNS_KEPT = 1024
MAX_MANIFESTS_KEPT = 4096
MAX_PAGES_KEPT = 1024
MAX_CLAIMS_KEPT = 4096
MAX_JOBS_LISTED = 100
NUM_READERS = 8

#: A page of a run's lines: its run, kind, rank, attempt, position and limit.
PageKey = tuple[str, str, str, int | None, Hashable, int]

_WAITING = frozenset({RunState.QUEUED, RunState.RECOVERING})


@dataclass(slots=True)
class _Seen:
    """The highest numbers seen so far of one average; listings need not begin before them."""

    newest: int = 0
    assessed: int = 0


class _KnownRun:
    """A run's spec and log; the lock is held while the log is used, since `RunLog` is for one thread."""

    def __init__(self, spec: RunSpec, log: RunLog) -> None:
        self.spec = spec
        self.log = log
        self.lock = threading.Lock()
        self.averages: defaultdict[str, _Seen] = defaultdict(_Seen)
        self.averager = Attendance()
        self.seen: tuple[float, RunSnapshot] | None = None

    def keep(self, run: RunSnapshot, *, read_at: float) -> None:
        """Remember what was seen, unless a later look has been made."""
        if self.seen is None or self.seen[0] <= read_at:
            self.seen = (read_at, run)


class Catalog:
    """Reads runs and averages from `store`. Methods may be called from several threads."""

    def __init__(self, store: ObjectStore, *, clock: Clock) -> None:
        self.store = store
        self.clock = clock
        self.keys_in_use = KeysInUse()
        #: What keys stand for, by owner and key: a key is mostly sent again while its first answer is under way.
        self.claims: Kept[tuple[str, str], KeyedSubmission] = Kept(MAX_CLAIMS_KEPT)
        self._runs: Kept[str, _KnownRun] = Kept(MAX_RUNS_KEPT)
        self._manifests: Kept[tuple[str, str, int], AverageManifest] = Kept(MAX_MANIFESTS_KEPT)
        self._assessments: Kept[tuple[str, str, int], AssessmentRecord | None] = Kept(MAX_MANIFESTS_KEPT)
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="catalog")
        self.pages_of_ended: Kept[PageKey, bytes] = Kept(MAX_PAGES_KEPT)
        self._looks = Budget(share=0.1, most_s=1.0, clock=clock)
        self.index = Index(store, read=self.snapshots, clock=clock)

    def close(self) -> None:
        """Let the reading threads end."""
        self.index.close()
        self._readers.shutdown(wait=False, cancel_futures=True)

    def spec(self, run_id: str) -> RunSpec:
        """A run's spec.

        Raises:
            RunNotFoundError: there is no such run.
        """
        return self._known(run_id).spec

    def entries(self, run_id: str, *, anew: bool = False) -> tuple[Entry, ...]:
        """A run's whole log as of now, or a moment ago when there is no time to look; `anew` looks in any case."""
        if not anew and (seen := self.recent(run_id)) is not None:
            return seen.entries
        with self._looking(), self._fresh(run_id) as run:
            return tuple(run.log.entries)

    def recent(self, run_id: str) -> RunSnapshot | None:
        """What was seen of a run a moment ago, if that must do; None: ask the bucket. Never waits."""
        known = self._runs.peek(run_id)
        if known is None or known.seen is None or self._looks.take():
            return None
        self.index.wake()
        seen_at, run = known.seen
        is_recent = self.clock.monotonic() - seen_at < MAX_LAG_S
        return run if is_recent or self.index.confirmed(run_id) else None

    def recent_row(self, run_id: str) -> Row | None:
        """A run's row as seen a moment ago, if that must do; None: ask the bucket. Never waits."""
        row = self.index.row(run_id)
        if row is None or self._looks.take():
            return None
        self.index.wake()
        is_recent = self.clock.monotonic() - row.read_at < MAX_LAG_S
        return row if is_recent else self.index.confirmed(run_id)

    def row(self, run_id: str) -> Row:
        """The row of a run as the bucket has it now.

        Raises:
            RunNotFoundError: there is no such run.
        """
        self.snapshot(run_id, anew=True)
        row = self.index.row(run_id)
        assert row is not None  # noqa: S101  the look has just put it there
        return row

    def snapshot(self, run_id: str, *, anew: bool = False) -> RunSnapshot:
        """All that a run resource is made of: as of now, or a moment ago when there is no time to look.

        Raises:
            RunNotFoundError: there is no such run.
        """
        if not anew and (seen := self.recent(run_id)) is not None:
            return seen
        marks, read_at = self.index.marks_of(run_id), self.clock.monotonic()
        with self._looking():
            with self._fresh(run_id) as known:
                entries, desired = tuple(known.log.entries), known.log.desired_state
            run = self._attended(known, self._look(known.spec, entries, desired=desired))
        known.keep(run, read_at=read_at)
        self.index.keep(run, marks=marks, read_at=read_at)
        return run

    def snapshots(self, run_ids: Iterable[str]) -> list[RunSnapshot]:
        """Several runs, read side by side; one that was never wholly created, or that is damaged, is left out."""

        def read(run_id: str) -> RunSnapshot | None:
            try:
                return self.snapshot(run_id, anew=True)
            except RunNotFoundError:
                return None
            except CorruptError as error:
                log.warning("run_unreadable", run_id=run_id, error=error.message, code=error.code)
                return None

        return [found for found in self._readers.map(read, run_ids) if found is not None]

    def side_by_side(self, read: Callable[[K], V], items: Iterable[K]) -> list[V]:
        """What `read` gives for each item, in order, several at a time."""
        return list(self._readers.map(read, items))

    def newest_jobs(self, known: Jobs[RecordT, AttemptT, ResultT]) -> list[Job[RecordT, ResultT]]:
        """The newest jobs of one kind for one average, newest first."""
        return self.side_by_side(known.fetch, islice(reversed(known.ids()), MAX_JOBS_LISTED))

    def is_known(self, run_id: str) -> bool:
        """Whether a run's log has been seen here, so that the run is wholly created."""
        known = self._runs.peek(run_id)
        return known is not None and bool(known.log.entries)

    def adopt(self, spec: RunSpec, log: RunLog) -> Row:
        """Know a run that was created just now, without reading it; its row."""
        known = self._runs.get(spec.run_id, lambda: _KnownRun(spec, log))
        read_at = self.clock.monotonic()
        empty = tuple(AverageSnapshot(average.name, None, None) for average in spec.request.averages)
        run = RunSnapshot(spec, tuple(log.entries), log.desired_state, heartbeat=None, averages=empty)
        known.keep(run, read_at=read_at)
        return self.index.keep(run, marks=UNDATED_MARKS, read_at=read_at)

    def generation(self, run_id: str, name: str, number: int) -> AverageManifest:
        """One generation of an average.

        Raises:
            AverageNotFoundError: the run has no such average, or it no such generation.
        """
        return self._manifest(self._generations(run_id, name), number)

    def assessment(self, run_id: str, name: str, number: int) -> AssessmentRecord | None:
        """The assessment of one generation, or None while there is none.

        Raises:
            AverageNotFoundError: the run has no average of this name.
        """
        return self._assessment(self._generations(run_id, name), number)

    def assessed_numbers(self, run_id: str, name: str) -> list[int]:
        """The generations that have been assessed, ascending.

        Raises:
            AverageNotFoundError: the run has no average of this name.
        """
        return self._generations(run_id, name).assessed_numbers()

    def wanted(self, run_id: str, name: str) -> AverageRequest:
        """What was asked for under `name`.

        Raises:
            AverageNotFoundError: the run has no average of this name.
        """
        submitted = {average.name: average for average in self.spec(run_id).request.averages}
        if name in submitted:
            return submitted[name]
        averages = {
            average.name: average for average in requested_averages(self.spec(run_id), self.entries(run_id))
        }
        if name not in averages:
            raise AverageNotFoundError(
                f"run {run_id} has no average {name[:100]!r}; it has {', '.join(averages) or 'none'}"
            )
        return averages[name]

    def average(self, run_id: str, name: str) -> AverageSnapshot:
        """Where an average stands.

        Raises:
            AverageNotFoundError: the run has no average of this name.
        """
        self.wanted(run_id, name)
        if (seen := self.recent(run_id)) is not None:
            return next(
                (known for known in seen.averages if known.name == name), AverageSnapshot(name, None, None)
            )
        return self._average(run_id, name)

    def _average(self, run_id: str, name: str) -> AverageSnapshot:
        known, seen = Generations(self.store, run_id, name), self._known(run_id).averages[name]
        seen.newest = max(known.numbers(after=max(seen.newest - 1, 0)), default=0)
        if seen.newest == 0:
            return AverageSnapshot(name, None, None)
        if seen.assessed < seen.newest:
            assessed = known.assessed_numbers(after=max(seen.assessed - 1, 0))
            seen.assessed = max((number for number in assessed if number <= seen.newest), default=0)
        served = self._assessment(known, seen.assessed) if seen.assessed else None
        return AverageSnapshot(name, self._manifest(known, seen.newest), served)

    def generations(self, run_id: str, name: str) -> Iterator[AverageManifest]:
        """An average's generations, newest first.

        Raises:
            AverageNotFoundError: the run has no average of this name.
        """
        known = self._generations(run_id, name)
        return (self._manifest(known, number) for number in reversed(known.numbers()))

    def holdings(self, run: RunSnapshot) -> Holdings:
        """What there is of a run that an average could be made from."""
        return fetch_holdings(self.store, run.spec, run.entries)

    def add_average(self, run_id: str, average: AverageRequest) -> RunSnapshot:
        """Ask for one more average of a run; the run thereafter.

        Raises:
            ConflictError: it has one of this name.
        """
        add_average(self.store, run_id, average, clock=self.clock)
        return self.snapshot(run_id, anew=True)

    def ask(self, run_id: str, wish: Callable[[ObjectStore, RunSpec, RunLog], None]) -> RunSnapshot:
        """Let `wish` say something in the log of a run (`services.api.asked.wishes`); the run thereafter."""
        with self._fresh(run_id) as run:
            wish(self.store, run.spec, run.log)
        return self.snapshot(run_id, anew=True)

    def _look(self, spec: RunSpec, entries: tuple[Entry, ...], *, desired: str) -> RunSnapshot:
        """What there is of a run beside its log. One that never started has no trainer and no generation."""
        state = entries[-1].state if entries else RunState.QUEUED
        has_started = len(entries) > 1
        names = [wanted.name for wanted in requested_averages(spec, entries)]
        return RunSnapshot(
            spec=spec,
            entries=entries,
            desired_state=desired,
            heartbeat=self._heartbeat(spec.run_id, "trainer") if has_started and not state.is_terminal else None,
            averages=tuple(
                self._average(spec.run_id, name) if has_started else AverageSnapshot(name, None, None)
                for name in names
            ),
            waiting=self._heartbeat(spec.run_id, WAITING) if entries and state in _WAITING else None,
        )

    def _attended(self, known: _KnownRun, run: RunSnapshot) -> RunSnapshot:
        """The run, with what keeps its averages from getting on."""
        if not is_averaging_due(run):
            known.averager.rest()
            return run
        beat = self._heartbeat(run.spec.run_id, AVERAGER)
        return replace(run, stall=known.averager.look(beat, clock=self.clock))

    @contextmanager
    def _looking(self) -> Iterator[None]:
        began = self.clock.monotonic()
        try:
            yield
        finally:
            self._looks.spent(self.clock.monotonic() - began)

    @contextmanager
    def _fresh(self, run_id: str) -> Iterator[_KnownRun]:
        run = self._known(run_id)
        # While the store hangs, those who ask for one run must not queue up behind each other's deadlines.
        if not run.lock.acquire(timeout=DEADLINE_S):
            raise StoreAwayError(f"other requests wait for its answer about run {run_id}")
        try:
            run.log.refresh()  # an ended run's, too: an average may have been added
            yield run
        finally:
            run.lock.release()

    def _known(self, run_id: str) -> _KnownRun:
        if not layout.is_run_id(run_id):
            raise RunNotFoundError(f"there is no run {run_id[:100]!r}")
        return self._runs.get(
            run_id,
            lambda: _KnownRun(fetch_spec(self.store, run_id), RunLog(self.store, run_id, clock=self.clock)),
        )

    def _generations(self, run_id: str, name: str) -> Generations:
        self.wanted(run_id, name)
        return Generations(self.store, run_id, name)

    def _manifest(self, generations: Generations, number: int) -> AverageManifest:
        key = (generations.run_id, generations.name, number)
        return self._manifests.get(key, lambda: generations.fetch(number))

    def _assessment(self, generations: Generations, number: int) -> AssessmentRecord | None:
        key = (generations.run_id, generations.name, number)
        return self._assessments.get(key, lambda: generations.fetch_assessment(number))

    def _heartbeat(self, run_id: str, who: str) -> Heartbeat | None:
        try:
            return Heartbeat.model_validate_json(self.store.get(layout.heartbeat(run_id, who)))
        except (ObjectNotFoundError, ValidationError):
            return None  # advisory: a heartbeat that cannot be read is none
