from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

from support.api import ApiRun
from wa_core import layout
from wa_core.records import Cancelled

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from wa_core.store.memory import MemoryStore


def write_logs(run: ApiRun, text: str, *, part: int, attempt: int = 1, rank: int | str = 0) -> None:
    """Ship a part of a rank's log."""
    run.store.put(layout.logs_part(run.run_id, attempt=attempt, rank=rank, part=part), text.encode())


def write_metrics(run: ApiRun, text: str, *, part: int, attempt: int = 1) -> None:
    """Ship a part of the metrics."""
    run.store.put(layout.metrics_part(run.run_id, attempt=attempt, part=part), text.encode())


def test_events_are_the_log_in_order(api: TestClient, store: MemoryStore) -> None:
    """Pages of events follow each other without a gap, and the last one says where to go on."""
    run = ApiRun(store).start()
    run.checkpoint(20)

    first = api.get(f"/v1/runs/{run.run_id}/events?limit=2").json()
    second = api.get(f"/v1/runs/{run.run_id}/events?after={first['next']}").json()
    third = api.get(f"/v1/runs/{run.run_id}/events?after={second['next']}").json()

    assert [event["kind"] for event in first["data"]] == ["submitted", "attempt_started"]
    assert [(event["seq"], event["kind"], event["step"]) for event in second["data"]] == [(3, "checkpoint", 20)]
    assert (first["has_more"], second["has_more"], third["data"], third["next"]) == (True, False, [], 3)
    assert "write_id" not in first["data"][0]


def test_events_can_be_streamed(api: TestClient, store: MemoryStore) -> None:
    """As server-sent events they go on after Last-Event-ID, follow the run, and end with it."""
    run = ApiRun(store).start()
    canceller = threading.Timer(0.3, lambda: run.log.append(Cancelled()))
    canceller.start()

    headers = {"Accept": "text/event-stream", "Last-Event-ID": "1"}
    answer = api.get(f"/v1/runs/{run.run_id}/events", headers=headers)

    canceller.join()
    blocks = [
        dict(line.split(": ", 1) for line in block.splitlines()) for block in answer.text.split("\n\n") if block
    ]
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert [(block["id"], block["event"]) for block in blocks] == [("2", "attempt_started"), ("3", "cancelled")]
    assert json.loads(blocks[1]["data"])["state"] == "cancelled"


def test_log_pages_give_every_line_once(api: TestClient, store: MemoryStore) -> None:
    """Following `next` over parts and attempts gives every line once, in order, also as more arrives."""
    run = ApiRun(store).start()
    write_logs(run, "one\ntwo\n", part=1)
    write_logs(run, "three\u2028still three\nfour", part=2)
    write_logs(run, "other rank\n", part=1, rank=1)
    run.start()
    write_logs(run, "five\n", part=1, attempt=2)

    def page(after: str | None, limit: int = 2) -> dict[str, object]:
        params = {"limit": limit} | ({"after": after} if after else {})
        return dict(api.get(f"/v1/runs/{run.run_id}/logs", params=params).json())

    lines: list[str] = []
    after: str | None = None
    for more in ("", "", "six\n", "", ""):
        if more:
            write_logs(run, more, part=2, attempt=2)
        found = page(after)
        lines += [line["text"] for line in found["data"]]  # type: ignore[attr-defined]
        after = found["next"]  # type: ignore[assignment]

    assert lines == ["one", "two", "three\u2028still three", "four", "five", "six"]


def test_logs_of_one_attempt_and_rank(api: TestClient, store: MemoryStore) -> None:
    """A rank and an attempt can be chosen."""
    run = ApiRun(store).start()
    write_logs(run, "from rank 1\n", part=1, rank=1)
    write_logs(run, "from the driver\n", part=1, rank="driver")

    rank = api.get(f"/v1/runs/{run.run_id}/logs?rank=1&attempt=1").json()
    driver = api.get(f"/v1/runs/{run.run_id}/logs?rank=driver").json()
    nothing = api.get(f"/v1/runs/{run.run_id}/logs?rank=1&attempt=2").json()

    assert rank["data"] == [{"attempt": 1, "rank": "1", "text": "from rank 1"}]
    assert [line["text"] for line in driver["data"]] == ["from the driver"]
    assert nothing == {"data": [], "has_more": False, "next": None}


def test_metrics_are_paged_and_clean(api: TestClient, store: MemoryStore) -> None:
    """Metric lines come in order with their attempt; a NaN is null, and a torn line is shown as such."""
    run = ApiRun(store).start()
    write_metrics(run, '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": NaN}\n', part=1)
    write_metrics(run, '{"step": 3, "lo', part=2)

    first = api.get(f"/v1/runs/{run.run_id}/metrics?limit=2").json()
    second = api.get(f"/v1/runs/{run.run_id}/metrics?after={first['next']}").json()

    assert first["data"] == [{"step": 1, "loss": 2.5, "attempt": 1}, {"step": 2, "loss": None, "attempt": 1}]
    assert first["has_more"]
    assert second["data"] == [{"unreadable": '{"step": 3, "lo', "attempt": 1}]
    assert not second["has_more"]


def blocks(text: str) -> list[dict[str, str]]:
    """The events of a stream."""
    found = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    return [dict(line.split(": ", 1) for line in block.splitlines()) for block in found]


def test_logs_can_be_followed(api: TestClient, store: MemoryStore) -> None:
    """With `follow`, log lines come as events until the run has ended, those of its last moment included."""
    run = ApiRun(store).start()
    write_logs(run, "one\ntwo\n", part=1)

    def end() -> None:
        write_logs(run, "three\n", part=2)
        run.log.append(Cancelled())

    ending = threading.Timer(0.3, end)
    ending.start()

    answer = api.get(f"/v1/runs/{run.run_id}/logs?follow=1")

    ending.join()
    events = blocks(answer.text)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert [json.loads(event["data"])["text"] for event in events] == ["one", "two", "three"]
    assert [(event["event"], event["id"]) for event in events] == [
        ("log", "1-1-1"),
        ("log", "1-1-2"),
        ("log", "1-2-1"),
    ]


def test_a_follower_that_comes_back_misses_nothing(api: TestClient, store: MemoryStore) -> None:
    """Last-Event-ID, or `after`, goes on after that line, within pages and across them; metrics do likewise."""
    run = ApiRun(store).start()
    write_logs(run, "one\ntwo\nthree\n", part=1)
    write_metrics(run, '{"step": 1}\n{"step": 2}\n', part=1)
    run.log.append(Cancelled())

    headers = {"Last-Event-ID": "1-1-1"}
    logs = api.get(f"/v1/runs/{run.run_id}/logs?follow=1&limit=1", headers=headers)
    metrics = api.get(f"/v1/runs/{run.run_id}/metrics?follow=1&after=1-1-1")

    assert [json.loads(event["data"])["text"] for event in blocks(logs.text)] == ["two", "three"]
    assert [json.loads(event["data"]) for event in blocks(metrics.text)] == [{"step": 2, "attempt": 1}]


def test_nothing_is_followed_that_is_not_there(api: TestClient) -> None:
    """A stream of an unknown run is 404 before it begins."""
    unknown = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
    paths = [f"/v1/runs/{unknown}/logs?follow=1", f"/v1/runs/{unknown}/metrics?follow=1"]
    headers = {"Accept": "text/event-stream"}

    assert [api.get(path).status_code for path in paths] == [404, 404]
    assert api.get(f"/v1/runs/{unknown}/events", headers=headers).json()["code"] == "run_not_found"
