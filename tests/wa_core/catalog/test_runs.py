from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import stamina
from hypothesis import given, settings
from hypothesis import strategies as st

from support.faulty import CrashAfter, Fault, FaultyStore
from support.logs import RECIPE, checkpoint, open_log, submitted
from wa_core import layout
from wa_core.catalog.runs import (
    RunLog,
    fetch_spec,
    lineage,
    list_active,
    list_queue,
    list_run_ids,
    submit,
)
from wa_core.clock import ManualClock
from wa_core.errors import (
    AlreadyFinishedError,
    ConflictError,
    CorruptError,
    FencedError,
    RunNotFoundError,
    StoreUnavailableError,
)
from wa_core.records import (
    AttemptFailed,
    AttemptStarted,
    Cancelled,
    CancelRequested,
    Failed,
    LogEntry,
    PauseRequested,
    RunRequest,
    RunState,
    Submitted,
    Succeeded,
    TrainingFinished,
)
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from support.seaweed import Seaweed
    from wa_core.store.base import ObjectStore


CLAIMABLE = {RunState.QUEUED, RunState.RECOVERING}


def claim(log: RunLog, runner_id: str = "runner") -> AttemptStarted:
    """Take the run as a runner does."""
    resumed_from = log.lineage[-1].seq if log.lineage else None
    return log.append(AttemptStarted(runner_id=runner_id, resumed_from=resumed_from), expect=CLAIMABLE)


class TestSubmit:
    """A submission leaves a run that everybody finds."""

    def test_a_submitted_run_is_queued_and_found(self) -> None:
        """After a submission the spec, the log, the queue and the active list agree."""
        store = MemoryStore()
        request = RunRequest(recipe=RECIPE, priority=7, seed=3)

        spec = submit(store, request, clock=ManualClock())

        log = open_log(store, spec.run_id)
        log.refresh()
        assert fetch_spec(store, spec.run_id).request == request
        assert [type(entry) for entry in log.entries] == [Submitted]
        assert (log.state, log.attempt, log.desired_state) == (RunState.QUEUED, 0, "succeeded")
        assert list(list_queue(store)) == [(layout.queue_marker(spec.run_id, priority=7), spec.run_id)]
        assert list(list_active(store)) == list_run_ids(store) == [spec.run_id]

    def test_runs_are_listed_newest_first_and_queued_by_priority(self) -> None:
        """Runs are listed from the newest; the queue goes by priority, then by age."""
        store, clock = MemoryStore(), ManualClock()
        ids = []
        for priority in (50, 10, 50):
            clock.advance(1)
            ids.append(submit(store, RunRequest(recipe=RECIPE, priority=priority), clock=clock).run_id)

        assert list_run_ids(store) == ids[::-1]
        assert [run_id for _, run_id in list_queue(store)] == [ids[1], ids[0], ids[2]]

    @pytest.mark.parametrize("num_operations", range(4))
    def test_a_crash_while_submitting_leaves_a_whole_run_or_none(self, num_operations: int) -> None:
        """F13: killed after any operation, a submission leaves nothing that is listed, or a queued run."""
        store = FaultyStore(MemoryStore())
        with stamina.set_testing(True, attempts=1), pytest.raises(StoreUnavailableError):
            submit(CrashAfter(store, num_operations), RunRequest(recipe=RECIPE), clock=ManualClock())

        for run_id in list_run_ids(store):
            assert fetch_spec(store, run_id).request.recipe == RECIPE
            log = open_log(store, run_id)
            log.refresh()
            assert log.state is RunState.QUEUED
            assert run_id in {waiting for _, waiting in list_queue(store)}
            assert claim(log).attempt == 1

    @pytest.mark.parametrize("run_id", ["../x", "", "01ARZ3NDEKTSV4RRFFQ69G5FAV", "a\0b", "x" * 10_000])
    def test_unknown_runs_are_not_found(self, run_id: str) -> None:
        """An id that names no run, whatever it looks like, is not found."""
        with pytest.raises(RunNotFoundError):
            fetch_spec(MemoryStore(), run_id)

    def test_a_spec_of_another_version_is_refused(self) -> None:
        """A spec that this version cannot read is corrupt, and the message names its key and the field."""
        store = MemoryStore()
        run_id = submitted(store)
        body = store.get(layout.run_spec(run_id)).replace(b'"format":1', b'"format":2')
        store.put(layout.run_spec(run_id), body)

        with pytest.raises(CorruptError, match=r"run\.json cannot be read: format"):
            fetch_spec(store, run_id)


class TestLog:
    """The log is the truth about a run."""

    def test_entries_are_stamped_in_order(self) -> None:
        """Each entry gets its number, time, attempt and state; a fresh reader sees the same."""
        store = MemoryStore()
        log = open_log(store, submitted(store))

        claim(log)
        log.append(checkpoint(20), attempt=1)
        log.append(TrainingFinished(step=20), attempt=1)
        log.append(Succeeded(), expect={RunState.FINALIZING})

        reader = open_log(store, log.run_id)
        assert list(reader.refresh()) == list(log.entries)
        assert [(entry.seq, entry.attempt, entry.state) for entry in reader.entries] == [
            (1, 0, RunState.QUEUED),
            (2, 1, RunState.STARTING),
            (3, 1, RunState.RUNNING),
            (4, 1, RunState.FINALIZING),
            (5, 1, RunState.SUCCEEDED),
        ]
        assert all(entry.at is not None for entry in reader.entries)

    def test_refreshing_reads_only_what_is_new(self) -> None:
        """A second refresh returns, and reads, only the entries since."""
        inner = MemoryStore()
        store = FaultyStore(inner)
        run_id = submitted(inner)
        reader = open_log(store, run_id)
        reader.refresh()
        claim(open_log(inner, run_id))
        store.calls.clear()

        assert [entry.seq for entry in reader.refresh()] == [2]
        assert reader.refresh() == []
        assert [operation for operation, _ in store.calls] == ["list", "get", "list"]

    def test_reading_goes_on_where_it_broke_off(self) -> None:
        """Entries read before a failure are kept, and none is read twice or left out."""
        inner = MemoryStore()
        store = FaultyStore(inner)
        log = open_log(inner, submitted(inner))
        claim(log)
        log.append(checkpoint(1))
        reader = open_log(store, log.run_id)
        store.next_call("get", Fault.DELAY, Fault.DROP_RESPONSE)

        with pytest.raises(StoreUnavailableError):
            reader.refresh()
        reader.refresh()

        assert list(reader.entries) == list(log.entries)

    def test_a_missing_entry_is_corrupt(self) -> None:
        """A hole in the log is reported, never stepped over."""
        store = MemoryStore()
        log = open_log(store, submitted(store))
        claim(log)
        log.append(checkpoint(1))
        store.delete(layout.log_entry(log.run_id, 2))

        with pytest.raises(CorruptError, match=r"0000000002\.json is missing"):
            open_log(store, log.run_id).refresh()

    @pytest.mark.parametrize(
        "body", [b"", b"<html>", b"{}", b'{"kind":"exploded","seq":2}', b'{"kind":"submitted","format":2,"seq":2}']
    )
    def test_an_unreadable_entry_is_corrupt(self, body: bytes) -> None:
        """An entry of an unknown kind or version, or no entry at all, is reported with its key."""
        store = MemoryStore()
        run_id = submitted(store)
        store.put(layout.log_entry(run_id, 2), body)

        with pytest.raises(CorruptError, match=r"0000000002\.json cannot be read") as found:
            open_log(store, run_id).refresh()
        assert found.value.code == "record_unreadable"

    def test_an_entry_at_the_wrong_place_is_corrupt(self) -> None:
        """An entry whose number is not its key's is reported."""
        store = MemoryStore()
        run_id = submitted(store)
        store.put(layout.log_entry(run_id, 2), store.get(layout.log_entry(run_id, 1)))

        with pytest.raises(CorruptError, match="says that it is entry 1"):
            open_log(store, run_id).refresh()

    def test_a_listing_that_lags_behind_is_no_hole(self) -> None:
        """An entry that a listing leaves out although it is there is read all the same."""
        store = LaggingStore()
        log = open_log(store, submitted(store))
        claim(log)
        log.append(checkpoint(1))
        store.hidden = layout.log_entry(log.run_id, 2)

        reader = open_log(store, log.run_id)
        reader.refresh()

        assert list(reader.entries) == list(log.entries)

    def test_appending_the_same_entry_again_changes_nothing(self) -> None:
        """After an append whose answer was lost, appending the entry again finds it; it is in the log once."""
        inner = MemoryStore()
        store = FaultyStore(inner)
        log = open_log(store, submitted(inner))
        claim(log)
        entry = checkpoint(5)
        store.next_call("create", Fault.DROP_RESPONSE)
        with stamina.set_testing(True, attempts=1), pytest.raises(StoreUnavailableError):
            log.append(entry, attempt=1)

        again = log.append(entry, attempt=1)

        assert again.seq == 3
        assert len(list(inner.list(layout.log_prefix(log.run_id)))) == 3


class LaggingStore(MemoryStore):
    """A store one of whose keys is not listed yet."""

    hidden = ""

    def list(self, prefix: str, start_after: str = "", *, delimiter: str | None = None):  # type: ignore[no-untyped-def]  # noqa: ANN201
        """All but the hidden one."""
        found = super().list(prefix, start_after=start_after, delimiter=delimiter)
        return (info for info in found if info.key != self.hidden)


class TestFencing:
    """Only the newest attempt may speak for a run, and nobody once it has ended."""

    def test_f18_a_zombie_is_refused(self) -> None:
        """F18: an older attempt that wakes up after a newer one started is fenced, and its entry is nowhere."""
        store = MemoryStore()
        zombie = open_log(store, submitted(store))
        claim(zombie)
        zombie.append(checkpoint(1), attempt=1)
        runner = open_log(store, zombie.run_id)
        runner.refresh()
        runner.append(AttemptFailed(reason="worker_died"), attempt=1)
        claim(runner)

        with pytest.raises(FencedError, match="attempt 1 is over, attempt 2 has taken over"):
            zombie.append(checkpoint(2), attempt=1)

        assert runner.refresh() == []

    def test_f18_a_zombie_in_the_middle_of_its_append_is_refused(self) -> None:
        """F18: an attempt that had already chosen its number when the newer one took it is fenced too."""
        store = Interposed()
        zombie = open_log(store, submitted(store))
        claim(zombie)

        def take_over() -> None:
            runner = open_log(store, zombie.run_id)
            runner.append(AttemptFailed(reason="worker_died"), attempt=1)
            claim(runner)

        store.before_next_create = take_over

        with pytest.raises(FencedError):
            zombie.append(checkpoint(1), attempt=1)

        assert lineage(zombie.entries) == []

    def test_one_of_two_claimers_wins(self) -> None:
        """Two runners that claim a run at once: one starts an attempt, the other hears a conflict."""
        store = Interposed()
        first, second = (open_log(store, run_id) for run_id in [submitted(store)] * 2)
        store.before_next_create = lambda: claim(second, "second")

        with pytest.raises(ConflictError, match="is starting, so it cannot take 'attempt_started'"):
            claim(first, "first")

        assert [entry.runner_id for entry in first.entries if isinstance(entry, AttemptStarted)] == ["second"]

    @pytest.mark.parametrize("end", [Succeeded(), Failed(reason="x"), Cancelled()])
    def test_nothing_is_said_after_the_end(self, end: LogEntry) -> None:
        """Cancelling, or adding to, a run that has ended is refused, and says how it ended."""
        store = MemoryStore()
        log = open_log(store, submitted(store))
        log.append(end)

        with pytest.raises(AlreadyFinishedError, match=log.state.value):
            log.append(CancelRequested())

        assert len(log.entries) == 2

    def test_a_checkpoint_after_its_attempts_failure_leaves_the_run_recovering(self) -> None:
        """An attempt's last checkpoint may land after its failure; the run still waits for a new attempt."""
        store = MemoryStore()
        log = open_log(store, submitted(store))
        claim(log)
        log.append(AttemptFailed(reason="driver_died"), attempt=1)

        late = log.append(checkpoint(1), attempt=1)

        assert log.state is RunState.RECOVERING
        assert claim(log).resumed_from == late.seq


class Interposed(MemoryStore):
    """Lets somebody act between a writer's decision and its create."""

    def __init__(self) -> None:
        super().__init__()
        self.before_next_create = lambda: None

    def create(self, key: str, body: bytes) -> None:
        """Let the other go first, once."""
        act, self.before_next_create = self.before_next_create, lambda: None
        act()
        super().create(key, body)


class TestConcurrentAppends:
    """Nothing is lost and nothing is there twice, whatever happens on the way."""

    @settings(max_examples=25, deadline=None)
    @given(
        seed=st.integers(0, 2**32),
        rates=st.fixed_dictionaries(
            dict.fromkeys(
                [Fault.DROP_REQUEST, Fault.DROP_RESPONSE, Fault.DUPLICATE, Fault.TRUNCATE], st.floats(0, 0.2)
            )
        ),
        num_writers=st.integers(1, 4),
    )
    def test_every_entry_is_there_once(self, seed: int, rates: dict[Fault, float], num_writers: int) -> None:
        """Writers that append at once through failing stores get all their entries in, once, in their order."""
        inner = MemoryStore()
        run_id = submitted(inner)

        def write(writer: int) -> list[str]:
            return write_some(inner, run_id, rates, seed + writer)

        with stamina.set_testing(True, attempts=1000), ThreadPoolExecutor(num_writers) as pool:  # without waits
            written = list(pool.map(write, range(num_writers)))

        log = open_log(inner, run_id)
        log.refresh()
        found = [entry.write_id for entry in log.entries[1:]]
        assert sorted(found) == sorted(itertools.chain(*written))
        for own in written:
            assert [write_id for write_id in found if write_id in set(own)] == own

    def test_on_a_real_store(self, seaweed: Seaweed) -> None:
        """Four writers that append at once to one log on a real store all get in, once."""
        store = seaweed.new_store()
        run_id = submitted(store)

        with ThreadPoolExecutor(4) as pool:
            written = list(pool.map(lambda writer: write_some(store, run_id, {}, writer), range(4)))

        log = open_log(store, run_id)
        log.refresh()
        assert sorted(entry.write_id for entry in log.entries[1:]) == sorted(itertools.chain(*written))


def write_some(inner: ObjectStore, run_id: str, rates: dict[Fault, float], seed: int) -> list[str]:
    """Append five entries and return their write ids."""
    log = open_log(FaultyStore(inner, rates=rates, seed=seed), run_id)
    return [log.append(PauseRequested()).write_id for _ in range(5)]
