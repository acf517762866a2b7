"""What the API says of its requests: ids, access lines and time series."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import structlog
from fastapi.testclient import TestClient

from support.api import ApiRun, app_over, serving, submission
from support.faulty import FaultyStore
from support.patience import eventually
from wa_core.records import Failed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.store.memory import MemoryStore

Lines = list[Any]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """The log lines of the test, with what was bound to them."""
    merge = structlog.contextvars.merge_contextvars
    with structlog.testing.capture_logs(processors=[merge]) as found:
        yield found


def test_a_request_keeps_the_id_that_its_caller_gave_it(api: TestClient, lines: Lines) -> None:
    """The caller's X-Request-Id is in the answer, in the problem document and in the access line."""
    answer = api.get("/v1/runs/nothing", headers={"X-Request-Id": "caller-7/a"})

    problem = answer.json()
    assert answer.headers["X-Request-Id"] == "caller-7/a"
    assert (problem["request_id"], problem["instance"]) == ("caller-7/a", "urn:wa:request:caller-7/a")
    assert [line["request_id"] for line in lines if line["event"] == "request"] == ["caller-7/a"]


@pytest.mark.parametrize("sent", ["", "a" * 129, "two words", 'quote"', "new\tline", "\u00e9".encode()])
def test_an_id_that_may_not_stand_in_a_log_is_replaced(api: TestClient, sent: str | bytes) -> None:
    """Ids that are long, empty or not plain text are not taken over, and the request is answered all the same."""
    answer = api.get("/livez", headers=[(b"X-Request-Id", sent if isinstance(sent, bytes) else sent.encode())])

    assert answer.status_code == 200
    assert len(answer.headers["X-Request-Id"]) == 32


def test_every_request_gets_an_id_of_its_own(api: TestClient) -> None:
    """Without an id of the caller's, two requests have two, also where no route matched."""
    ids = {api.get(path).headers["X-Request-Id"] for path in ("/version", "/version", "/nothing")}

    assert len(ids) == 3


def test_an_access_line_says_what_was_asked_and_nothing_secret(
    store: MemoryStore, api: TestClient, lines: Lines
) -> None:
    """One line a request: method, route, status, seconds, bytes and the run, but no query and no token."""
    run = ApiRun(store)

    answer = api.get(f"/v1/runs/{run.run_id}?wait=0&token=hunter2", headers={"Authorization": "Bearer hunter3"})

    (line,) = [line for line in lines if line["event"] == "request"]
    assert line["method"] == "GET"
    assert line["route"] == "/v1/runs/{run_id}"
    assert line["run_id"] == run.run_id
    assert (line["status"], line["sent_bytes"]) == (200, len(answer.content))
    assert 0 < line["seconds"] < 60
    assert "hunter" not in json.dumps(lines)


def test_probes_are_logged_only_when_they_fail(store: MemoryStore, lines: Lines) -> None:
    """A probe that is answered well every few seconds fills no log; one that is not has its line."""
    faulty = FaultyStore(store)
    with TestClient(app_over(faulty)) as api:
        faulty.is_away = True
        assert api.get("/livez").status_code == 200
        assert api.get("/metrics").status_code == 200
        assert api.get("/readyz").status_code == 503

    assert [line["route"] for line in lines if line["event"] == "request"] == ["/readyz"]


def test_what_nobody_foresaw_is_found_by_its_id(store: MemoryStore, lines: Lines) -> None:
    """A 500 names the request, and the line with the traceback carries the same id."""
    app = app_over(store)

    @app.get("/broken", dependencies=[])
    def broken() -> None:
        raise ZeroDivisionError("secret detail")

    with TestClient(app) as api:
        problem = api.get("/broken").json()

    (failed,) = [line for line in lines if line["event"] == "request_failed"]
    assert problem["code"] == "internal"
    assert problem["request_id"] == failed["request_id"]


def test_requests_and_the_store_are_counted_and_timed(store: MemoryStore) -> None:
    """The store's latency is told by operation, its failures by kind, and an absent object is no failure."""
    faulty = FaultyStore(store)
    with TestClient(app_over(faulty)) as api:
        api.post("/v1/runs", json=submission())
        api.get("/v1/runs/01J00000000000000000000000")
        before = api.get("/metrics").text
        faulty.is_away = True
        api.get("/v1/runs")
        after = api.get("/metrics").text

    assert 'wa_store_operation_seconds_count{operation="create"}' in before
    assert 'wa_store_errors_total{kind="store_unavailable",operation="list"}' in after
    assert "wa_store_errors_total{" not in before
    assert 'wa_build_info{format="1",service="api",version="' in after
    assert "wa_api_requests_in_flight 1.0" in after  # the one that asks
    assert "process_resident_memory_bytes" in after


def test_clients_that_are_sent_events_are_counted_while_they_listen(store: MemoryStore) -> None:
    """An event stream counts as a client for as long as it is open, and its length is no latency."""
    run = ApiRun(store)
    with serving(store) as url, httpx2.Client(base_url=url, trust_env=False, timeout=20) as http:
        stream = {"Accept": "text/event-stream"}
        with http.stream("GET", f"/v1/runs/{run.run_id}/events", headers=stream) as events:
            chunks = events.iter_raw()
            next(chunks)
            during = http.get("/metrics").text
            run.log.append(Failed(reason="test"))
            list(chunks)
        after = eventually(
            lambda: "wa_api_event_streams 0.0" in (text := http.get("/metrics").text) and text, what="its end"
        )

    assert "wa_api_event_streams 1.0" in during
    assert 'wa_api_request_seconds_count{method="GET",route="/v1/runs/{run_id}/events"}' not in after
