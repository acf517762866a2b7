from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest
import structlog
from fastapi.testclient import TestClient

from services.api.state.patience import BriefStore, StoreAwayError
from services.api.state.readiness import Readiness
from support.api import ApiRun, app_over, submission
from support.faulty import Fault, FaultyStore
from wa_core.catalog.runs import list_run_ids
from wa_core.errors import StoreAuthError, StoreUnavailableError
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx2

    from wa_core.store.base import ByteRange


def ready(api: TestClient, *, status: int) -> httpx2.Response:
    """Ask until `/readyz` answers `status`; the probe runs in the background."""
    deadline = time.monotonic() + 60
    while (answer := api.get("/readyz")).status_code != status and time.monotonic() < deadline:
        time.sleep(0.02)
    assert answer.status_code == status
    return answer


class LockedStore(MemoryStore):
    """A store that refuses the credentials."""

    def list(self, *_args: object, **_kwargs: object) -> object:  # type: ignore[override]
        """Refuse."""
        raise StoreAuthError("the store refuses access key 'wa'")


class StuckStore(MemoryStore):
    """A store whose reads hang until it is told to answer."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = threading.Event()

    def get(self, key: str, range: ByteRange | None = None) -> bytes:
        """Hang, then read."""
        self.answers.wait(30)
        return super().get(key, range=range)


class BrokenStore(MemoryStore):
    """A store with a fault that nobody foresaw."""

    def list(self, *_args: object, **_kwargs: object) -> object:  # type: ignore[override]
        """Fail."""
        raise ZeroDivisionError("secret detail")


def test_a_ready_service_names_its_checks(api: TestClient) -> None:
    """Readiness lists every promise of the store that was tried."""
    checks = ready(api, status=200).json()["checks"]

    assert checks["second-create-is-refused"] == "ok"
    assert checks["store_answers"] == "ok"


def test_a_store_that_is_away_degrades_the_service(store: MemoryStore) -> None:
    """Fault F10: while the store is away the process lives, says so within seconds, and recovers with it."""
    faulty = FaultyStore(store)
    with TestClient(app_over(faulty)) as api:
        ready(api, status=200)
        run = ApiRun(store)
        faulty.is_away = True
        began_at = time.monotonic()

        answers = [
            api.get("/v1/runs"),
            api.get(f"/v1/runs/{run.run_id}"),
            api.post(f"/v1/runs/{run.run_id}:cancel"),
            api.post("/v1/runs", json=submission()),
        ]
        degraded = api.get("/readyz")
        took_s = time.monotonic() - began_at
        alive = api.get("/livez")
        faulty.is_away = False
        recovered = api.get("/v1/runs")

    assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(503, "storage_unavailable")}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers)
    assert (degraded.status_code, degraded.json()["code"]) == (503, "degraded")
    assert "store_answers" in degraded.json()["checks"]
    assert (alive.status_code, recovered.status_code) == (200, 200)
    assert took_s < 4 * 10


def test_a_store_that_never_answers_is_given_up(store: MemoryStore) -> None:
    """Fault F10: a call that hangs is given up at its deadline, and later calls still go through."""
    stuck = StuckStore()
    brief = BriefStore(stuck, deadline_s=0.3)
    began_at = time.monotonic()

    with pytest.raises(StoreAwayError, match=r"no answer within 0\.3 s"):
        brief.get("key")
    took_s = time.monotonic() - began_at
    stuck.answers.set()
    stuck.put("key", b"body")

    assert took_s < 5
    assert BriefStore(stuck).get("key") == b"body"


class EmptyHandedStore(MemoryStore):
    """Opens an object, and then breaks off before its first byte."""

    num_opened = 0

    def stream(self, key: str, start: int = 0, *, end: int | None = None) -> Iterator[bytes]:
        """Open."""
        self.num_opened += 1
        return self._broken()

    def _broken(self) -> Iterator[bytes]:
        raise StoreUnavailableError("broken off (on purpose)")
        yield b""


def test_a_download_that_gets_nowhere_is_given_up() -> None:
    """A store that opens an object and gives none of it is not asked for ever."""
    store = EmptyHandedStore()

    with pytest.raises(StoreAwayError, match="broken off"):
        list(BriefStore(store).stream("key"))

    assert store.num_opened == 3


def test_a_lost_response_makes_no_second_run(store: MemoryStore) -> None:
    """Fault F4: when the answer to a create is lost, the submission still makes one run and answers 202."""
    faulty = FaultyStore(store)
    with TestClient(app_over(faulty)) as api:
        ready(api, status=200)
        faulty.next_call("create", Fault.DROP_RESPONSE, Fault.DROP_REQUEST, Fault.DROP_RESPONSE)

        answer = api.post("/v1/runs", json=submission())

    assert answer.status_code == 202
    assert list_run_ids(store) == [answer.json()["run_id"]]


def test_f11_an_unsafe_store_is_refused(store: MemoryStore) -> None:
    """Fault F11: a store that ignores If-None-Match is named as such, and the process is told to end."""
    faulty = FaultyStore(store, rates={Fault.IGNORE_CONDITION: 1.0}, operations=frozenset({"create"}))
    told: list[str] = []
    readiness = Readiness(faulty, faulty, on_unsafe=told.append)

    readiness.start()
    deadline = time.monotonic() + 60
    while not told and time.monotonic() < deadline:
        time.sleep(0.02)

    assert "second-create-is-refused" in told[0]


@pytest.mark.parametrize(
    ("broken", "status", "code"), [(LockedStore(), 503, "storage_auth"), (BrokenStore(), 500, "internal")]
)
def test_faults_give_nothing_away(broken: MemoryStore, status: int, code: str) -> None:
    """Refused credentials are told from an outage, and what nobody foresaw is logged but not shown."""
    with structlog.testing.capture_logs() as logs, TestClient(app_over(broken)) as api:
        answer = api.get("/v1/runs")

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert "secret detail" not in answer.text
    assert "Traceback" not in answer.text
    assert status != 500 or "request_failed" in [line["event"] for line in logs]


def test_metrics_count_by_route_not_by_path(api: TestClient) -> None:
    """However many paths are asked for, the time series are as many as the routes."""
    for n in range(20):
        api.get(f"/v1/runs/x{n}")
        api.get(f"/nothing/{n}")

    text = api.get("/metrics").text

    assert 'wa_api_requests_total{method="GET",route="/v1/runs/{run_id}",status="404"} 20.0' in text
    assert 'wa_api_requests_total{method="GET",route="unmatched",status="404"} 20.0' in text
    assert "x7" not in text


def test_the_front_page_needs_nothing_from_elsewhere(api: TestClient) -> None:
    """The page at `/` leads to the documentation and loads nothing from other hosts."""
    page = api.get("/")

    assert page.headers["Content-Type"].startswith("text/html")
    assert 'href="/openapi.json"' in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text


def test_the_description_is_whole(api: TestClient) -> None:
    """Every reference in the OpenAPI description resolves, and every operation has its own id."""
    document = api.get("/openapi.json")

    schema = document.json()
    names = set(schema["components"]["schemas"])
    referenced = {part.split('"')[0] for part in document.text.split("#/components/schemas/")[1:]}
    ids = [operation["operationId"] for path in schema["paths"].values() for operation in path.values()]
    assert referenced <= names
    assert {"RunRequest", "RunResource", "Problem"} <= names
    assert len(ids) == len(set(ids))


def test_version_tells_the_format(api: TestClient) -> None:
    """The version route tells the service's version and the bucket's format."""
    answer = api.get("/version").json()

    assert answer["format"] == 1
    assert answer["version"]
