"""Run log and generations against perfect models in memory, over stores that lose requests and responses.

Several clients with stale views act in any order; hypothesis chooses it, and shrinks what breaks.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import stamina
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from support.faulty import Fault, FaultyStore
from support.logs import open_log, submitted
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.catalog.runs import RunLog  # noqa: TC001  hypothesis reads the annotations
from wa_core.errors import AlreadyFinishedError, ConflictError, FencedError, StoreUnavailableError
from wa_core.records import (
    AttemptFailed,
    AttemptStarted,
    AverageManifest,
    Cancelled,
    CancelRequested,
    CheckpointCommitted,
    Failed,
    LogEntry,
    Paused,
    PauseRequested,
    ResumeRequested,
    RunState,
    Succeeded,
    TrainingFinished,
)
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable

DIGEST = "0" * 64
TRIES = 3  # of one operation before its caller's patience ends

# What each kind of entry does to the state, from docs/format.md; None: nothing.
STATES = {
    "submitted": "queued",
    "attempt_started": "starting",
    "pause_requested": "pausing",
    "paused": "paused",
    "resume_requested": "queued",
    "attempt_failed": "recovering",
    "training_finished": "finalizing",
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
}
ENDS = {"succeeded", "failed", "cancelled"}

faults = st.lists(st.sampled_from([Fault.DROP_REQUEST, Fault.DROP_RESPONSE, Fault.DUPLICATE]), max_size=TRIES)
entries = st.one_of(
    st.builds(CheckpointCommitted, step=st.integers(0, 50), files=st.just({}), spec_digest=st.just(DIGEST)),
    st.builds(AttemptFailed, reason=st.just("died")),
    st.builds(TrainingFinished, step=st.integers(0, 50)),
    *(st.builds(kind) for kind in (PauseRequested, Paused, ResumeRequested, CancelRequested)),
)
endings = st.one_of(st.builds(Succeeded), st.builds(Cancelled), st.builds(Failed, reason=st.just("x")))


@dataclass
class LogModel:
    """A run log that is never wrong: (kind, attempt, state, write id) of each entry, and the surviving seqs."""

    entries: list[tuple[str, int, str, str]] = field(default_factory=list)
    lineage: list[int] = field(default_factory=list)

    @property
    def state(self) -> str:
        """The run's state."""
        return self.entries[-1][2]

    @property
    def attempt(self) -> int:
        """The newest attempt."""
        return self.entries[-1][1]

    def holds(self, entry: LogEntry) -> bool:
        """Whether this very write is in the log."""
        return entry.write_id in {write_id for *_, write_id in self.entries}

    def refusal(self, *, attempt: int | None, expect: str | None) -> type[ConflictError] | None:
        """Why a new entry must be refused, or None."""
        if attempt is not None and attempt != self.attempt:
            return FencedError
        if self.state in ENDS:
            return AlreadyFinishedError
        return ConflictError if expect is not None and expect != self.state else None

    def append(self, entry: LogEntry) -> None:
        """Take an entry that is not refused."""
        kind = entry.kind  # type: ignore[attr-defined]
        seq, state, attempt = len(self.entries) + 1, self.state if self.entries else "queued", 0
        if self.entries:
            attempt = self.attempt + (kind == "attempt_started")
        if kind == "checkpoint":
            state = "running" if state == "starting" else state
            self.lineage.append(seq)
        elif kind == "attempt_started":
            self.lineage = [kept for kept in self.lineage if kept <= (entry.resumed_from or 0)]  # type: ignore[attr-defined]
        self.entries.append((kind, attempt, STATES.get(kind, state), entry.write_id))


class Interposed(FaultyStore):
    """Lets somebody else act right before the next create."""

    rival: Callable[[], object] | None = None

    def create(self, key: str, body: bytes) -> None:
        """Let the other go first, once."""
        rival, self.rival = self.rival, None
        if rival:
            rival()
        super().create(key, body)


class LogMachine(RuleBasedStateMachine):
    """One run's log and any number of clients that know some part of it."""

    clients = Bundle("clients")
    written = Bundle("written")

    @initialize(target=clients)
    def submit(self) -> RunLog:
        """A run and its first client."""
        self.truth = MemoryStore()
        self.store = Interposed(self.truth)
        self.model = LogModel()
        self.run_id = submitted(self.truth)
        first = open_log(self.truth, self.run_id)
        first.refresh()
        self.model.append(first.entries[0])
        return open_log(self.store, self.run_id)

    @rule(target=clients)
    def join(self) -> RunLog:
        """Somebody new, who knows nothing yet."""
        return open_log(self.store, self.run_id)

    @rule(client=clients)
    def refresh(self, client: RunLog) -> None:
        """A refresh returns just what the client did not know."""
        known = len(client.entries)

        assert [entry.write_id for entry in client.refresh()] == [one[3] for one in self.model.entries[known:]]

    @rule(client=clients, runner=st.sampled_from("ab"), place=st.none() | st.integers(0, 20), lost=faults)
    def start_attempt(self, client: RunLog, runner: str, place: int | None, lost: list[Fault]) -> None:
        """A runner takes the run, growing from any surviving checkpoint or from none."""
        origin = (
            None
            if place is None or not self.model.lineage
            else self.model.lineage[place % len(self.model.lineage)]
        )
        self._append(client, AttemptStarted(runner_id=runner, resumed_from=origin), None, None, lost)

    @rule(
        target=written,
        client=clients,
        entry=entries,
        behind=st.none() | st.integers(0, 2),
        expect=st.none() | st.sampled_from(sorted(set(STATES.values()))),
        lost=faults,
        rival=st.none() | st.builds(AttemptStarted, runner_id=st.just("rival")) | entries,
    )
    def append(
        self,
        client: RunLog,
        entry: LogEntry,
        behind: int | None,
        expect: str | None,
        lost: list[Fault],
        rival: LogEntry | None,
    ) -> tuple[LogEntry, int | None]:
        """Somebody says something, for an attempt that may be over, maybe while somebody else does."""
        attempt = None if behind is None else max(0, self.model.attempt - behind)
        self._append(client, entry, attempt, expect, lost, rival)
        return entry, attempt

    @rule(client=clients, said=written, lost=faults)
    def append_again(self, client: RunLog, said: tuple[LogEntry, int | None], lost: list[Fault]) -> None:
        """Saying the same entry again, by anybody, changes nothing if it is in the log."""
        self._append(client, said[0], said[1], None, lost)

    @precondition(lambda self: len(self.model.entries) > 12)
    @rule(client=clients, entry=endings, lost=faults)
    def end(self, client: RunLog, entry: LogEntry, lost: list[Fault]) -> None:
        """The run ends."""
        self._append(client, entry, None, None, lost)

    def _append(
        self,
        client: RunLog,
        entry: LogEntry,
        attempt: int | None,
        expect: str | None,
        lost: list[Fault],
        rival: LogEntry | None = None,
    ) -> None:
        is_there = self.model.holds(entry)
        refusal = None if is_there else self.model.refusal(attempt=attempt, expect=expect)
        if rival and not is_there and not refusal:  # else nothing is created, and the rival never has its turn
            self.store.rival = lambda: open_log(self.truth, self.run_id).append(rival)
            self.model.append(rival)
            refusal = self.model.refusal(attempt=attempt, expect=expect)
        self.store.next_call("create", *lost)
        try:
            with stamina.set_testing(True, attempts=TRIES):
                client.append(entry, attempt=attempt, expect=None if expect is None else {RunState(expect)})
        except StoreUnavailableError:
            outcome: type[Exception] | None = StoreUnavailableError
        except ConflictError as error:
            outcome = type(error)
        else:
            outcome = None
        self.store._script.clear()
        if outcome is StoreUnavailableError:
            assert len(lost) == TRIES, "it gave up although a try was left"
            # Whoever heard nothing must not guess; the truth is in the store, and it must be one of the two.
            is_new = len(list(self.truth.list(layout.log_prefix(self.run_id)))) > len(self.model.entries)
            assert not (is_new and (refusal or is_there))
            if is_new:
                self.model.append(entry)
            return
        assert outcome is refusal
        if refusal is None and not is_there:
            self.model.append(entry)

    @invariant()
    def the_log_is_the_model(self) -> None:
        """Somebody who reads it all sees the model: every entry once, in order, with its attempt and state."""
        if not hasattr(self, "model"):
            return
        reader = open_log(self.truth, self.run_id)
        reader.refresh()
        found = [(entry.kind, entry.attempt, str(entry.state), entry.write_id) for entry in reader.entries]
        assert found == self.model.entries
        assert [entry.seq for entry in reader.entries] == list(range(1, len(found) + 1))
        assert [entry.seq for entry in reader.lineage] == self.model.lineage


class GenerationsMachine(RuleBasedStateMachine):
    """The generations of one average, and averagers that build on the one they know."""

    averagers = Bundle("averagers")

    @initialize()
    def begin(self) -> None:
        """An average without generations."""
        self.truth = MemoryStore()
        self.store = FaultyStore(self.truth)
        self.run_id = submitted(self.truth)
        self.model: list[AverageManifest] = []
        self.known: defaultdict[int, int] = defaultdict(int)

    @rule(target=averagers)
    def join(self) -> int:
        """An averager that has just started: it knows of no generation."""
        return len(self.known) + len(self.model) * 100

    @rule(averager=averagers)
    def read(self, averager: int) -> None:
        """It reads the newest generation, and that is the model's."""
        newest = Generations(self.store, self.run_id, "a").newest()

        assert newest == (self.model[-1] if self.model else None)
        self.known[averager] = newest.generation if newest else 0

    @rule(averager=averagers, cursor=st.integers(0, 9), lost=faults)
    def publish(self, averager: int, cursor: int, lost: list[Fault]) -> None:
        """It publishes on top of what it knows: taken if, and only if, that is still the newest."""
        manifest = AverageManifest(
            run_id=self.run_id,
            name="a",
            generation=self.known[averager] + 1,
            at=datetime(2026, 1, 1, tzinfo=UTC),
            rule="swa",
            accumulator_dtype="float64",
            cursor=cursor,
        )
        is_newest = self.known[averager] == len(self.model)
        self.store.next_call("create", *lost)
        try:
            with stamina.set_testing(True, attempts=TRIES):
                Generations(self.store, self.run_id, "a").commit(manifest)
        except FencedError:
            assert not is_newest
        except StoreUnavailableError:
            assert len(lost) == TRIES
            if layout.generation(self.run_id, "a", manifest.generation) in self._keys() and is_newest:
                self.model.append(manifest)
        else:
            assert is_newest
            self.model.append(manifest)
            self.known[averager] = manifest.generation
        self.store._script.clear()

    @invariant()
    def the_generations_are_the_model(self) -> None:
        """They are numbered without a hole, each as its winner wrote it, and never change."""
        if not hasattr(self, "model"):
            return
        generations = Generations(self.truth, self.run_id, "a")
        assert generations.numbers() == list(range(1, len(self.model) + 1))
        assert list(generations.newest_first()) == self.model[::-1]

    def _keys(self) -> set[str]:
        return {info.key for info in self.truth.list("")}


TestLogMachine = LogMachine.TestCase
TestLogMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestGenerationsMachine = GenerationsMachine.TestCase
TestGenerationsMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
