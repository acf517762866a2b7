"""Averaging that does not get on says so, with the reason; averaging that does is never called stalled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient

from services.api.app import create_app
from services.api.state.attendance import PATIENCE_S
from services.averager.lease import Lease, Worker
from wa_core.clock import ManualClock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.api import ApiRun
    from wa_core.store.memory import MemoryStore


@pytest.fixture
def clock() -> ManualClock:
    """The time, as the API and the averager have it."""
    return ManualClock()


@pytest.fixture
def api(store: MemoryStore, clock: ManualClock) -> Iterator[TestClient]:
    """The API over `store`, at that time."""
    with TestClient(create_app(store=store, clock=clock)) as client:
        yield client


@pytest.fixture
def lease(store: MemoryStore, run: ApiRun, clock: ManualClock) -> Lease:
    """An averager's hold of the run."""
    return Lease(store, run.run_id, worker=Worker(), clock=clock)


def seen(api: TestClient, run: ApiRun) -> tuple[str, str | None]:
    """What the averaging of the run does, and the code of the reason."""
    found = api.get(f"/v1/runs/{run.run_id}").json()
    return found["averaging_state"], found["reason"] and found["reason"]["code"]


def test_work_that_nobody_does_is_stalled(api: TestClient, run: ApiRun, clock: ManualClock) -> None:
    """A checkpoint to fold and no averager for half a minute: `stalled`, `no_averager`, and that in lists too."""
    run.checkpoint(40)
    at_first = seen(api, run)
    clock.advance(PATIENCE_S)

    assert (at_first, seen(api, run)) == (("folding", None), ("stalled", "no_averager"))
    assert api.get("/v1/runs").json()["data"][0]["averaging_state"] == "stalled"


def test_an_averager_that_works_is_not_stalled(
    api: TestClient, run: ApiRun, lease: Lease, clock: ManualClock
) -> None:
    """However long a fold takes, the averager's note keeps changing."""
    run.checkpoint(40)
    for _ in range(5):
        lease.hold()
        assert seen(api, run) == ("folding", None)
        clock.advance(PATIENCE_S / 2)


def test_nobody_need_be_there_when_nothing_is_to_do(api: TestClient, run: ApiRun, clock: ManualClock) -> None:
    """All is published: no averager is missed, and the half minute begins with the next checkpoint."""
    for _ in range(3):
        assert seen(api, run) == ("published", None)
        clock.advance(PATIENCE_S)
    run.checkpoint(40)

    assert seen(api, run) == ("folding", None)


def test_an_averager_says_what_is_wrong(api: TestClient, run: ApiRun, lease: Lease) -> None:
    """What it cannot get over is the reason at once, until it works again."""
    run.checkpoint(40)
    lease.hold()
    lease.report(reason="record_unreadable", detail="runs/1/log/2.json is of format 2")
    in_trouble = api.get(f"/v1/runs/{run.run_id}").json()
    run.fold(body=b"newer weights")

    assert in_trouble["averaging_state"] == "stalled"
    assert in_trouble["reason"] == {"code": "record_unreadable", "message": "runs/1/log/2.json is of format 2"}
    assert seen(api, run) == ("published", None)
