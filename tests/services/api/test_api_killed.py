"""The API killed while it takes submissions: real processes, a real socket, SIGKILL."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx2

from support.api import submission
from support.api_nursery import ApiNursery
from support.ports import free_port
from wa_core.catalog.runs import RunLog, list_active, list_queue, list_run_ids
from wa_core.clock import SystemClock
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from pathlib import Path

NUM_KILLS = 100


def listening(http: httpx2.Client) -> None:
    """Return once the API answers."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(httpx2.TransportError):
            if http.get("/livez").status_code == 200:
                return
        time.sleep(0.005)
    raise AssertionError("the API did not start")


def post(http: httpx2.Client, key: str) -> httpx2.Response | None:
    """The answer to a submission under a key, or None if the connection was cut."""
    try:
        return http.post("/v1/runs", json=submission(), headers={"Idempotency-Key": key})
    except httpx2.TransportError:
        return None


def submitted(answer: httpx2.Response | None) -> str:
    """The id of the run that a submission made, or had made."""
    assert answer is not None
    assert answer.status_code == 202
    run_id: str = answer.json()["run_id"]
    return run_id


def test_f13_a_killed_api_makes_each_run_once(tmp_path: Path) -> None:
    """F13: 100 times SIGKILL during POST /runs; the retry with the same key finds the run, or makes it, once."""
    draw = random.Random(0)
    store = LocalStore(tmp_path / "bucket")
    found: list[str] = []
    num_cut = 0
    anew = httpx2.Limits(max_keepalive_connections=0)  # a connection for each request
    with (
        ApiNursery(tmp_path / "bucket", free_port()) as api,
        httpx2.Client(base_url=api.url, timeout=60, limits=anew, trust_env=False) as http,
    ):
        api.start()
        listening(http)
        found += [submitted(post(http, "the first, which takes longest")), submitted(post(http, "the second"))]
        began = time.monotonic()
        found.append(submitted(post(http, "one that takes as long as most")))
        within_s = time.monotonic() - began
        for number in range(NUM_KILLS):
            listening(http)
            answers: list[httpx2.Response | None] = []
            key = f"submission {number}"
            sender = threading.Thread(target=lambda key=key, answers=answers: answers.append(post(http, key)))
            sender.start()
            time.sleep(draw.uniform(0.0, within_s))
            api.kill()
            sender.join()
            was_cut = answers == [None]
            num_cut += was_cut
            within_s *= 1.25 if was_cut else 0.8  # follows the speed of the machine: about half of them are cut
            api.start()
            listening(http)
            found.append(submitted(post(http, key)))
            if answers[0] is not None:
                assert submitted(answers[0]) == found[-1]

    assert sorted(found, reverse=True) == list_run_ids(store)
    assert len(set(found)) == len(found) == NUM_KILLS + 3
    assert {run_id for _, run_id in list_queue(store)} == set(list_active(store)) == set(found)
    for run_id in found:
        log = RunLog(store, run_id, clock=SystemClock())
        log.refresh()
        assert [entry.kind for entry in log.entries] == ["submitted"]
    assert num_cut > NUM_KILLS / 4, "hardly any submission was cut, so nothing was shown"
