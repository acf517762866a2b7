"""What the API knows of runs, read from the bucket and kept only to read less of it again.

Everything here can be thrown away at any moment: logs grow by appending, specs and generations never change, so
a cache only ever lags, and every look at a run asks the bucket what is new. An API replica holds no state.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from pydantic import ValidationError

from services.api.patience import DEADLINE_S, StoreAwayError
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.catalog.holdings import fetch_holdings
from wa_core.catalog.runs import RunLog, add_average, fetch_spec, lineage, list_run_ids, requested_averages
from wa_core.errors import AverageNotFoundError, ObjectNotFoundError, RunNotFoundError
from wa_core.records import WAITING, CheckpointCommitted, Entry, Heartbeat, RunSpec, RunState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from wa_core.catalog.catch_up import Holdings
    from wa_core.clock import Clock
    from wa_core.records import AssessmentRecord, AverageManifest, AverageRequest
    from wa_core.store.base import ObjectStore

K = TypeVar("K")
V = TypeVar("V")

MAX_RUNS_KEPT = 1024
MAX_MANIFESTS_KEPT = 4096
NUM_READERS = 8

_WAITING = frozenset({RunState.QUEUED, RunState.RECOVERING})


@dataclass(frozen=True, slots=True)
class AverageSnapshot:
    """One average: its newest generation, and the newest that has been assessed and can be downloaded."""

    name: str
    newest: AverageManifest | None
    served: AssessmentRecord | None


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """A run at one moment."""

    spec: RunSpec
    entries: tuple[Entry, ...]
    desired_state: str
    heartbeat: Heartbeat | None
    averages: tuple[AverageSnapshot, ...]
    waiting: Heartbeat | None = None

    @property
    def state(self) -> RunState:
        """The state that the log's last entry gives."""
        return self.entries[-1].state if self.entries else RunState.QUEUED

    @property
    def attempt(self) -> int:
        """The newest attempt, 0 before the first."""
        return self.entries[-1].attempt if self.entries else 0

    @property
    def wanted(self) -> list[AverageRequest]:
        """The averages asked for, in the order of `averages`."""
        return requested_averages(self.spec, self.entries)

    @property
    def lineage(self) -> list[CheckpointCommitted]:
        """The surviving checkpoints."""
        return lineage(self.entries)


class _Kept(Generic[K, V]):
    """The most recently used values of a function, safe for threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value kept for `key`, or a new one. Two threads may make it; the first stays. None is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        made = make()
        if made is None:
            return made
        with self._lock:
            kept = self._values.setdefault(key, made)
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        return kept


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


class Catalog:
    """Reads runs and averages from `store`. Methods may be called from several threads."""

    def __init__(self, store: ObjectStore, *, clock: Clock) -> None:
        self.store = store
        self._clock = clock
        self._runs: _Kept[str, _KnownRun] = _Kept(MAX_RUNS_KEPT)
        self._manifests: _Kept[tuple[str, str, int], AverageManifest] = _Kept(MAX_MANIFESTS_KEPT)
        self._assessments: _Kept[tuple[str, str, int], AssessmentRecord | None] = _Kept(MAX_MANIFESTS_KEPT)
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="catalog")

    def close(self) -> None:
        """Let the reading threads end."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    def spec(self, run_id: str) -> RunSpec:
        """A run's spec.

        Raises:
            RunNotFoundError: there is no such run.
        """
        return self._known(run_id).spec

    def entries(self, run_id: str) -> tuple[Entry, ...]:
        """A run's whole log as of now."""
        with self._fresh(run_id) as run:
            return tuple(run.log.entries)

    def snapshot(self, run_id: str) -> RunSnapshot:
        """All that a run resource is made of.

        Raises:
            RunNotFoundError: there is no such run.
        """
        with self._fresh(run_id) as run:
            entries, desired = tuple(run.log.entries), run.log.desired_state
        is_over = bool(entries) and entries[-1].state.is_terminal
        return RunSnapshot(
            spec=run.spec,
            entries=entries,
            desired_state=desired,
            heartbeat=None if is_over else self._heartbeat(run_id, "trainer"),
            averages=tuple(self._average(run_id, wanted.name) for wanted in requested_averages(run.spec, entries)),
            waiting=self._heartbeat(run_id, WAITING) if entries and entries[-1].state in _WAITING else None,
        )

    def snapshots(self, run_ids: Iterable[str]) -> list[RunSnapshot]:
        """Several runs, read side by side; a run that was never wholly created is left out."""

        def read(run_id: str) -> RunSnapshot | None:
            try:
                return self.snapshot(run_id)
            except RunNotFoundError:
                return None

        return [found for found in self._readers.map(read, run_ids) if found is not None]

    def side_by_side(self, read: Callable[[K], V], items: Iterable[K]) -> list[V]:
        """What `read` gives for each item, in order, several at a time."""
        return list(self._readers.map(read, items))

    def run_ids(self, *, before: str | None) -> list[str]:
        """Ids of runs older than `before` (None: of all), newest first."""
        return [run_id for run_id in list_run_ids(self.store) if before is None or run_id < before]

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

    def add_average(self, run_id: str, average: AverageRequest) -> None:
        """Ask for one more average of a run.

        Raises:
            ConflictError: it has one of this name.
        """
        add_average(self.store, run_id, average, clock=self._clock)

    def ask(self, run_id: str, wish: Callable[[ObjectStore, RunSpec, RunLog], None]) -> None:
        """Let `wish` say something in the log of a run (`services.api.wishes`)."""
        with self._fresh(run_id) as run:
            wish(self.store, run.spec, run.log)

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
            lambda: _KnownRun(fetch_spec(self.store, run_id), RunLog(self.store, run_id, clock=self._clock)),
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
