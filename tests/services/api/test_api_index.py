"""Lists from memory: right after every write, and cheap when there are many runs."""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

from fastapi.testclient import TestClient

from services.api.asked.selection import Selection, select_file
from services.api.state.budget import Budget
from services.api.state.catalog import Catalog
from services.api.state.index import Query
from support.api import ApiRun, app_over, submission, take_time_to_look
from wa_core import layout
from wa_core.clock import ManualClock, SystemClock
from wa_core.records import RunState, Succeeded, TrainingFinished
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.clock import Clock
    from wa_core.store.base import ByteRange, ObjectInfo


class CountingStore(MemoryStore):
    """Counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def get(self, key: str, range: ByteRange | None = None) -> bytes:
        """Read, and count."""
        self.calls["get"] += 1
        return super().get(key, range=range)

    def list(self, prefix: str, start_after: str = "", *, delimiter: str | None = None) -> Iterator[ObjectInfo]:
        """List, and count."""
        self.calls["list"] += 1
        return super().list(prefix, start_after=start_after, delimiter=delimiter)

    def create(self, key: str, body: bytes) -> None:
        """Create, and count."""
        self.calls["create"] += 1
        super().create(key, body)

    def put(self, key: str, body: Any) -> None:
        """Write, and count."""
        self.calls["put"] += 1
        super().put(key, body)


def finished(store: MemoryStore, **labels: str) -> ApiRun:
    """A run that has ended, with its average published and its markers gone, as an averager leaves it."""
    run = ApiRun(store, labels=labels).start()
    run.checkpoint(20)
    run.fold(body=b"weights")
    run.log.append(TrainingFinished(step=20))
    run.log.append(Succeeded())
    store.delete(layout.queue_marker(run.run_id, priority=50))
    store.delete(layout.active_marker(run.run_id))
    return run


def quiet(store: MemoryStore, clock: Clock | None = None) -> Catalog:
    """A catalogue whose index is kept up by the test alone."""
    catalog = Catalog(store, clock=clock or SystemClock())
    if clock is None:
        take_time_to_look(catalog)
    catalog.index.close()
    return catalog


def states(catalog: Catalog) -> dict[str, str]:
    """What a list shows of all runs, by memory alone if possible."""
    rows = catalog.index.recent_page(Query(), before=None, limit=1000)
    if rows is None:
        rows = catalog.index.page(Query(), before=None, limit=1000)
    return {row.run_id: row.state for row in rows}


def test_a_list_of_many_runs_costs_a_few_requests() -> None:
    """Once they are known, runs that have ended cost nothing in a list: it looks at the markers alone."""
    store = CountingStore()
    runs = [finished(store) for _ in range(40)]
    app = app_over(store)
    app.state.catalog.index.close()  # nothing is kept up behind the requests
    with TestClient(app) as api:
        while api.get("/readyz").status_code != 200:
            pass
        api.get("/v1/runs?limit=200")
        store.calls.clear()

        listed = api.get("/v1/runs?limit=200").json()["data"]

        assert store.calls.total() <= 3
    assert [run["run_id"] for run in listed] == sorted((run.run_id for run in runs), reverse=True)


def test_a_list_is_right_after_every_change(api: TestClient, store: MemoryStore) -> None:
    """Whoever changes a run, this replica or another process, the next list shows it while requests are few."""
    run = ApiRun(store)
    seen = []

    def listed() -> list[str]:
        return [shown["state"] for shown in api.get("/v1/runs").json()["data"]]

    seen.append(listed())
    run.start()
    seen.append(listed())
    run.checkpoint(20)
    seen.append(listed())
    api.post(f"/v1/runs/{run.run_id}:pause")
    seen.append(listed())
    api.post("/v1/runs", json=submission())
    seen.append(listed())

    assert seen == [["queued"], ["starting"], ["running"], ["pausing"], ["queued", "pausing"]]


def test_ticks_keep_the_rows_right_while_nobody_may_look() -> None:
    """When there is no time to look for each request, two ticks bring every change: to runs, and new runs."""
    store, clock = MemoryStore(), ManualClock()
    ended, running = finished(store), ApiRun(store).start()
    catalog = quiet(store, clock)
    assert states(catalog) == {ended.run_id: "succeeded", running.run_id: "starting"}
    while catalog.index._budget.take():
        pass
    running.checkpoint(20)
    ended.add("late")
    new = ApiRun(store)

    clock.advance(1.0)
    while catalog.index._budget.take():
        pass
    before = states(catalog)
    catalog.index.tick()
    after = states(catalog)

    catalog.close()
    assert before == {ended.run_id: "succeeded", running.run_id: "starting"}
    assert after == {ended.run_id: "succeeded", running.run_id: "running", new.run_id: "queued"}
    row = catalog.index.row(ended.run_id)
    assert row is not None
    assert b'"averaging_state":"waiting"' in row.body


def test_what_is_read_again_in_a_tick_is_bounded() -> None:
    """However many runs there are, a tick reads those under way and a handful of the others."""
    store = CountingStore()
    for _ in range(60):
        finished(store)
    catalog = quiet(store)
    catalog.index.page(Query(), before=None, limit=1000)
    store.calls.clear()

    catalog.index.tick()

    catalog.close()
    assert store.calls.total() <= 2 + 5 * 4


def test_old_looks_are_not_believed() -> None:
    """When the markers could not be looked at for seconds, a list says so instead of showing what was."""
    store, clock = MemoryStore(), ManualClock()
    finished(store)
    catalog = quiet(store, clock)
    states(catalog)
    clock.advance(11.0)

    assert catalog.index.recent_page(Query(), before=None, limit=10) is None
    catalog.close()


def test_weights_are_not_refused_for_what_was_seen_a_moment_ago() -> None:
    """When there is no time to look, an answer may be a moment old, but a refusal looks anew."""
    store, clock = MemoryStore(), ManualClock()
    run = ApiRun(store).start()
    catalog = quiet(store, clock)
    catalog.snapshot(run.run_id)
    run.checkpoint(20)
    run.fold(body=b"weights")
    while catalog.recent(run.run_id) is None:
        pass  # until the time for looks is used up

    served, _ = select_file(catalog, run.run_id, "swa", Selection(), file="weights.safetensors")

    catalog.close()
    assert served.generation == 1


def test_a_damaged_run_does_not_hide_the_others(api: TestClient, store: MemoryStore) -> None:
    """A run whose log cannot be read is left out of the list, and every other run is there."""
    damaged, sound = ApiRun(store), ApiRun(store)
    store.put(layout.log_entry(damaged.run_id, 1), b"{")

    listed = api.get("/v1/runs")

    assert [run["run_id"] for run in listed.json()["data"]] == [sound.run_id]


def test_a_submission_costs_few_requests() -> None:
    """A new run takes five writes, and sending its key again no more than a look at the run."""
    store = CountingStore()
    with TestClient(app_over(store)) as api:
        while api.get("/readyz").status_code != 200:
            pass
        store.calls.clear()
        headers = {"Idempotency-Key": "k"}

        first = api.post("/v1/runs", json=submission(), headers=headers)
        of_first, _ = store.calls.total(), store.calls.clear()
        again = api.post("/v1/runs", json=submission(), headers=headers)
        of_second, _ = store.calls.total(), store.calls.clear()
        listed = api.get("/v1/runs").json()["data"]

    assert of_first == 5
    assert of_second <= 2
    assert [run["run_id"] for run in listed] == [first.json()["run_id"]] == [again.json()["run_id"]]
    assert listed[0] == first.json()


def test_a_query_takes_what_never_changes_from_memory() -> None:
    """Runs of other owners, labels or times are not read again to be left out."""
    store = CountingStore()
    for number in range(20):
        ApiRun(store, labels={"number": str(number)}).start()
    catalog = quiet(store)
    catalog.index.page(Query(), before=None, limit=100)
    store.calls.clear()

    found = catalog.index.page(Query(labels=frozenset({("number", "7")})), before=None, limit=100)

    catalog.close()
    assert [dict(row.labels) for row in found] == [{"number": "7"}]
    assert store.calls.total() < 10


def test_queries_narrow_down_together() -> None:
    """States are alternatives; everything else must hold as well."""
    store = MemoryStore()
    ended, queued = finished(store, team="vision"), ApiRun(store, labels={"team": "vision"})
    ApiRun(store, labels={"team": "text"})
    catalog = quiet(store)

    def found(query: Query) -> set[str]:
        return {row.run_id for row in catalog.index.page(query, before=None, limit=100)}

    vision = frozenset({("team", "vision")})
    assert found(Query(labels=vision)) == {ended.run_id, queued.run_id}
    assert found(Query(labels=vision, states={RunState.QUEUED})) == {queued.run_id}
    assert found(Query(labels=vision, states={RunState.QUEUED, RunState.SUCCEEDED})) == {
        ended.run_id,
        queued.run_id,
    }
    assert found(Query(owner="nobody")) == set()
    catalog.close()


def test_a_burst_of_readers_is_served_from_what_was_just_seen() -> None:
    """When looking takes up its time, reads of an ended run ask the bucket for nothing, and still are right."""
    store, clock = CountingStore(), ManualClock()
    run = finished(store)
    catalog = quiet(store, clock)
    catalog.index.page(Query(), before=None, limit=10)
    first = catalog.row(run.run_id)
    while catalog._looks.take():
        pass
    store.calls.clear()

    again = catalog.recent_row(run.run_id)
    clock.advance(3.0)
    while catalog._looks.take():
        pass
    confirmed = catalog.recent_row(run.run_id)

    catalog.close()
    assert first is again is confirmed
    assert store.calls.total() == 0


def test_two_submissions_with_one_key_at_once_in_one_process() -> None:
    """Bad input 30: the key of a submission that is being made is 409 with Retry-After, and works again then."""
    store = StuckCreates()
    with TestClient(app_over(store)) as api:
        while api.get("/readyz").status_code != 200:
            pass
        store.let_go.clear()
        answers: list[Any] = []
        headers = {"Idempotency-Key": "k"}
        sender = threading.Thread(
            target=lambda: answers.append(api.post("/v1/runs", json=submission(), headers=headers))
        )
        sender.start()
        assert store.stuck.wait(60)

        meanwhile = api.post("/v1/runs", json=submission(), headers=headers)
        store.let_go.set()
        sender.join()
        afterwards = api.post("/v1/runs", json=submission(), headers=headers)

    assert (meanwhile.status_code, meanwhile.json()["code"]) == (409, "submission_in_progress")
    assert int(meanwhile.headers["Retry-After"]) >= 1
    assert answers[0].status_code == afterwards.status_code == 202
    assert answers[0].json()["run_id"] == afterwards.json()["run_id"]


def test_a_key_sent_again_under_load_is_answered_from_memory() -> None:
    """When looking takes up its time, a key sent again reads and writes nothing; another body is still refused."""
    store = CountingStore()
    headers = {"Idempotency-Key": "k"}
    with TestClient(app := app_over(store)) as api:
        while api.get("/readyz").status_code != 200:
            pass
        first = api.post("/v1/runs", json=submission(), headers=headers)
        app.state.catalog._looks = Budget(share=0.0, most_s=0.0, clock=SystemClock())
        store.calls.clear()

        again = api.post("/v1/runs", json=submission(), headers=headers)
        calls = {name: store.calls[name] for name in ("get", "put", "create")}
        refused = api.post("/v1/runs", json=submission(seed=7), headers=headers)

    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["Location"] == first.headers["Location"]
    assert calls == {"get": 0, "put": 0, "create": 0}
    assert (refused.status_code, refused.json()["code"]) == (422, "idempotency_key_reused")


class StuckCreates(MemoryStore):
    """A store whose creates hang until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()
        self.let_go.set()
        self.stuck = threading.Event()

    def create(self, key: str, body: bytes) -> None:
        """Hang, then create."""
        if not self.let_go.is_set():
            self.stuck.set()
            self.let_go.wait(120)
        super().create(key, body)
