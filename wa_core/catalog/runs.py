"""Runs: the immutable spec and the append-only log that is the truth about each run.

An entry's state follows from the state before it and its kind, so the last entry alone says what a run does.
Appending is fenced: what is said on behalf of an attempt is refused once a newer attempt has started.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from wa_core import layout
from wa_core.catalog.checkpoints import parse_entry
from wa_core.catalog.commit import COMMIT_PATIENCE_S, commit, parse, patiently
from wa_core.catalog.deliveries import mark_telling
from wa_core.catalog.hints import digest_of, is_worth_renewing, read_log_hint, write_log_hint
from wa_core.catalog.history import branched_at, extend, lineage, state_after
from wa_core.errors import (
    AlreadyFinishedError,
    ConflictError,
    CorruptError,
    FencedError,
    ObjectNotFoundError,
    RunNotFoundError,
)
from wa_core.records import (
    DEFAULT_OWNER,
    AttemptStarted,
    AverageAdded,
    AverageRequest,
    Cancelled,
    CancelRequested,
    CheckpointCommitted,
    Entry,
    LogEntry,
    Marker,
    Paused,
    PauseRequested,
    ResumeRequested,
    RunRequest,
    RunSpec,
    RunState,
    Submitted,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

E = TypeVar("E", bound=LogEntry)


def requested_averages(spec: RunSpec, entries: Iterable[LogEntry]) -> list[AverageRequest]:
    """The averages that a run should have: those submitted, then those added, in order. A name's first counts."""
    added = (entry.average for entry in entries if isinstance(entry, AverageAdded))
    wanted: dict[str, AverageRequest] = {}
    for average in (*spec.request.averages, *added):
        wanted.setdefault(average.name, average)
    return list(wanted.values())


def submit(store: ObjectStore, request: RunRequest, *, clock: Clock, owner: str = DEFAULT_OWNER) -> RunSpec:
    """Create a run, queued."""
    now = clock.now()
    spec = RunSpec(run_id=layout.new_run_id(now), created_at=now, owner=owner, request=request)
    create_run(store, spec, clock=clock)
    return spec


def create_run(store: ObjectStore, spec: RunSpec, *, clock: Clock) -> RunLog:
    """Write all that makes a run, and return its log. Doing so again, or at once with another, changes nothing.

    The markers come first: a crash in between leaves markers without a run, which readers ignore, and never a
    run that no runner will find. One that its owner trains has no place in the queue.
    """
    marker = Marker(run_id=spec.run_id, at=spec.created_at).model_dump_json().encode()
    store.put(layout.active_marker(spec.run_id), marker)
    mark_telling(store, spec)
    if spec.trainer == "service":
        store.put(layout.queue_marker(spec.run_id, priority=spec.request.priority), marker)
    commit(store, layout.run_spec(spec.run_id), spec)
    log = RunLog(store, spec.run_id, clock=clock)
    log.append(Submitted(write_id=spec.write_id), is_first=True)
    return log


def add_average(store: ObjectStore, run_id: str, request: AverageRequest, *, clock: Clock) -> AverageAdded:
    """Ask for one more average of a run, whatever its state; an averager finds the run by its active marker.

    The marker comes first, so that no crash leaves an average that nobody looks for; and again afterwards, since
    an averager that was just finishing the run may have taken the first one away. A needless marker is cleared.

    Raises:
        RunNotFoundError: there is no such run.
        ConflictError: the run has an average of this name (`average_exists`).
        TransientError: the store is away; the average may or may not have been added.
    """
    spec = fetch_spec(store, run_id)
    mark_active(store, run_id, clock=clock)
    mark_telling(store, spec)
    if request.name in {average.name for average in spec.request.averages}:
        raise _average_exists(run_id, request.name)
    added = RunLog(store, run_id, clock=clock).append(AverageAdded(average=request))
    mark_active(store, run_id, clock=clock)
    mark_telling(store, spec)
    return added


def mark_active(store: ObjectStore, run_id: str, *, clock: Clock) -> None:
    """Let averagers find a run."""
    store.put(layout.active_marker(run_id), Marker(run_id=run_id, at=clock.now()).model_dump_json().encode())


def fetch_spec(store: ObjectStore, run_id: str) -> RunSpec:
    """Read a run's spec.

    Raises:
        RunNotFoundError: there is no such run.
        CorruptError: its spec cannot be read.
    """
    if not layout.is_run_id(run_id):
        raise RunNotFoundError(f"there is no run {run_id!r}")
    key = layout.run_spec(run_id)
    try:
        body = patiently(lambda: store.get(key), patience_s=10.0)
    except ObjectNotFoundError:
        raise RunNotFoundError(f"there is no run {run_id}; list runs to see which there are") from None
    return parse(RunSpec.model_validate_json, body, key=key)


def list_run_ids(store: ObjectStore) -> list[str]:
    """The ids of all runs, newest first."""
    found = (layout.run_id_of(info.key) for info in store.list(layout.RUNS, delimiter="/"))
    return sorted((run_id for run_id in found if run_id), reverse=True)


def list_active(store: ObjectStore) -> Iterator[str]:
    """The ids of runs that are not yet wholly done, oldest first."""
    return (run_id for info in store.list(layout.ACTIVE) if (run_id := layout.run_id_of(info.key)))


def list_queue(store: ObjectStore) -> Iterator[tuple[str, str]]:
    """(marker key, run id) of the runs that wait, in the order in which they should start."""
    return ((info.key, run_id) for info in store.list(layout.QUEUE) if (run_id := layout.run_id_of(info.key)))


class RunLog:
    """One run's log, read incrementally and kept in memory. Not for several threads at once.

    `patience_s` is how long `append` tries while the store is away.
    """

    def __init__(
        self, store: ObjectStore, run_id: str, *, clock: Clock, patience_s: float = COMMIT_PATIENCE_S
    ) -> None:
        self.run_id = run_id
        self._patience_s = patience_s
        self._store = store
        self._clock = clock
        self._entries: list[Entry] = []
        self._lineage: list[CheckpointCommitted] = []
        self._last_sha256: str | None = None
        self._hinted = 0

    @property
    def entries(self) -> Sequence[Entry]:
        """What has been read so far, in order."""
        return self._entries

    @property
    def state(self) -> RunState:
        """The run's state as of the last entry read."""
        return self._entries[-1].state if self._entries else RunState.QUEUED

    @property
    def attempt(self) -> int:
        """The newest attempt, 0 before the first."""
        return self._entries[-1].attempt if self._entries else 0

    @property
    def lineage(self) -> list[CheckpointCommitted]:
        """The surviving checkpoints; see `lineage`."""
        return list(self._lineage)

    @property
    def branched_at(self) -> int:
        """The newest attempt that abandoned checkpoints; see `branched_at`."""
        return branched_at(self._entries)

    def is_past(self, attempt: int) -> bool:
        """Whether an attempt has nothing more to add: a newer one has started or is to, or the run has ended."""
        return self.attempt > attempt or self.state.is_terminal or self.state is RunState.QUEUED

    @property
    def desired_state(self) -> str:
        """What its owner wants: ``succeeded``, ``paused`` or ``cancelled``; a cancel cannot be taken back."""
        if any(isinstance(entry, CancelRequested | Cancelled) for entry in self._entries):
            return "cancelled"
        wishes = (PauseRequested, Paused, ResumeRequested)
        last = next((entry for entry in reversed(self._entries) if isinstance(entry, wishes)), None)
        return "succeeded" if last is None or isinstance(last, ResumeRequested) else "paused"

    def refresh(self) -> Sequence[Entry]:
        """Read what was appended since, and return just that.

        What was read before a failure stays in `entries`, and the next call goes on from there.

        Raises:
            CorruptError: an entry is missing or cannot be read.
            TransientError: the store is away.
        """
        known = len(self._entries)
        if not known:
            self._start_from_hint()
        read = len(self._entries)
        after = layout.log_entry(self.run_id, read) if read else ""
        for info in self._store.list(layout.log_prefix(self.run_id), start_after=after):
            # A listing is no snapshot: it may show an entry and not yet the one before it.
            while len(self._entries) < (layout.number_of(info.key) or 0):
                self._read_next()
        return self._entries[known:]

    def renew_hint(self) -> None:
        """Let others read this log faster, if it has grown enough since somebody last did; costs nothing if not.

        Raises:
            TransientError: the store is away.
        """
        if is_worth_renewing(len(self._entries), hinted=self._hinted):
            write_log_hint(self._store, self.run_id, self._entries)
            self._hinted = len(self._entries)

    def append(
        self,
        entry: E,
        *,
        attempt: int | None = None,
        expect: Collection[RunState] | None = None,
        is_first: bool = False,
    ) -> E:
        """Commit `entry` as the next one, and return it as written.

        Appending the same entry again, after an answer that was lost, finds it in the log and changes nothing.

        Args:
            entry: what happened; its seq, time, attempt and state are filled in here.
            attempt: on whose behalf it is said, when that is an attempt.
            expect: the states in which saying it makes sense; None for any that is not final.
            is_first: the log is probably empty, so it is not read before the first try.

        Raises:
            FencedError: a newer attempt has started.
            AlreadyFinishedError: the run has ended, and the entry is no `AverageAdded`.
            ConflictError: the run is in none of the states expected, or an average of the name to be added was
                added before (`average_exists`).
            TransientError: the store is away; the entry may or may not be in the log, and appending the same
                entry again is safe.
        """
        if not is_first:
            patiently(self.refresh, patience_s=self._patience_s)
        while True:
            if (written := self._find(entry)) is not None:
                return written
            self._check(entry, attempt=attempt, expect=expect)
            stamped = self._stamp(entry)
            key = layout.log_entry(self.run_id, stamped.seq)
            try:
                body = commit(self._store, key, stamped, patience_s=self._patience_s)
            except ConflictError:
                # Somebody else's entry has this seq. Read it before deciding again: it may have fenced us.
                patiently(self._read_next, patience_s=self._patience_s)
                continue
            # Another process that finishes the same submission may have stored it with another time.
            stored = stamped if body == stamped.model_dump_json().encode() else parse_entry(body, key=key)
            # Every LogEntry with a kind is an Entry, and the same write is of the same kind.
            self._add(stored, sha256=digest_of(body))  # type: ignore[arg-type]
            return stored  # type: ignore[return-value]

    def _find(self, entry: E) -> E | None:
        for known in reversed(self._entries):
            if known.write_id == entry.write_id and isinstance(known, type(entry)):
                return known
        return None

    def _check(self, entry: LogEntry, *, attempt: int | None, expect: Collection[RunState] | None) -> None:
        if attempt is not None and self.attempt != attempt:
            raise FencedError(
                f"run {self.run_id}: attempt {attempt} is over, attempt {self.attempt} has taken over"
            )
        if isinstance(entry, AverageAdded):
            self._check_is_new(entry.average.name)
            return
        if self.state.is_terminal:
            raise AlreadyFinishedError(f"run {self.run_id} has already {_ENDED[self.state]}; nothing was changed")
        if expect is not None and self.state not in expect:
            kind = getattr(entry, "kind", type(entry).__name__)
            raise ConflictError(f"run {self.run_id} is {self.state}, so it cannot take {kind!r}")

    def _check_is_new(self, name: str) -> None:
        if any(isinstance(entry, AverageAdded) and entry.average.name == name for entry in self._entries):
            raise _average_exists(self.run_id, name)

    def _stamp(self, entry: E) -> E:
        is_new_attempt = isinstance(entry, AttemptStarted)
        return entry.model_copy(
            update={
                "seq": len(self._entries) + 1,
                "previous": self._last_sha256,
                "at": self._clock.now(),
                "attempt": self.attempt + is_new_attempt,
                "state": state_after(self.state, entry),
            }
        )

    def _read_next(self) -> None:
        seq = len(self._entries) + 1
        key = layout.log_entry(self.run_id, seq)
        try:
            entry = parse_entry(body := self._store.get(key), key=key)
        except ObjectNotFoundError:
            raise CorruptError(f"{key} is missing, although later entries of the log exist") from None
        if entry.seq != seq:
            raise CorruptError(f"{key} says that it is entry {entry.seq}; the log is damaged")
        self._add(entry, sha256=digest_of(body))

    def _add(self, entry: Entry, *, sha256: str) -> None:
        self._entries.append(entry)
        extend(self._lineage, entry)
        self._last_sha256 = sha256

    def _start_from_hint(self) -> None:
        hint = read_log_hint(self._store, self.run_id)
        if hint is not None:
            self._entries, self._lineage = hint.entries, lineage(hint.entries)
            self._last_sha256, self._hinted = hint.last_sha256, len(hint.entries)


def _average_exists(run_id: str, name: str) -> ConflictError:
    return ConflictError(
        f"run {run_id} has an average {name!r} already; give the new one another name", code="average_exists"
    )


_ENDED = {RunState.SUCCEEDED: "succeeded", RunState.FAILED: "failed", RunState.CANCELLED: "been cancelled"}
