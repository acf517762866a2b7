"""The notifier with real receivers: what it sends, how often, and that nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client import REGISTRY

from services.notifier.sender import Sender
from services.notifier.worker import Notifier
from support.api import ApiRun
from support.faulty import FaultyStore
from support.patience import eventually
from support.receiver import KEY, SECRET, Receiver, receiving
from wa_core import layout
from wa_core.catalog.deliveries import fetch_delivery, list_deliveries, list_telling
from wa_core.catalog.runs import add_average, submit
from wa_core.clock import ManualClock, SystemClock
from wa_core.errors import TransientError
from wa_core.records import (
    AttemptStarted,
    AverageRequest,
    Cancelled,
    CancelRequested,
    Delivery,
    Failed,
    RunRequest,
    TrainingFinished,
    Webhook,
)
from wa_core.store.local import LocalStore
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from wa_core.store.base import ObjectStore

EVERYTHING = ["attempt_started", "training_finished", "failed", "cancelled", "succeeded", "published"]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """Somebody who wants to be told."""
    with receiving() as found:
        yield found


@pytest.fixture
def store() -> MemoryStore:
    """An empty bucket."""
    return MemoryStore()


class HookedRun(ApiRun):
    """A run with webhooks, whose trainer and averager are played by the test."""

    def __init__(self, store: ObjectStore, *webhooks: Webhook) -> None:
        super().__init__(store)  # for its helpers; what it has submitted tells nobody
        request = RunRequest(
            recipe="services.recipes.digits:Digits",
            averages=[AverageRequest(name="swa", rule="swa")],
            labels={"team": "vision"},
            webhooks=list(webhooks),
        )
        self.run_id = submit(store, request, clock=self.clock).run_id
        self.log = type(self.log)(store, self.run_id, clock=self.clock)

    def end(self) -> None:
        """Fail, and be done with."""
        self.log.append(Failed(reason="user_code", message="it raised"))
        self.store.delete(layout.active_marker(self.run_id))


def notifier(store: ObjectStore, **options: Any) -> Notifier:
    """One whose receivers are on this machine."""
    sender = options.pop("sender", Sender(allow_private=True))
    options = {"clock": SystemClock(), "look_interval_s": 0.0, "jitter": lambda: 0.0} | options
    return Notifier(store, post=sender.post, key=KEY, **options)


def settle(told: Notifier, *, seconds: float = 60.0) -> None:
    """Tick until nothing is due and nothing under way."""
    deadline = time.monotonic() + seconds
    while told.tick() or told.num_in_flight:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_events_are_posted_signed_and_once(store: MemoryStore, receiver: Receiver) -> None:
    """Each event that was asked for comes once, and no other, signed and with a link to the run."""
    run = HookedRun(store, Webhook(url=f"{receiver.url}/hook?a=1", events=["attempt_started", "failed"]))
    told = notifier(store, public_url="https://wa.example")
    run.start()
    settle(told)
    run.checkpoint(20)
    run.end()
    settle(told)
    settle(told)

    first, last = receiver.wait_for(2)
    assert len(receiver.received) == 2
    assert first.is_signed
    assert last.is_signed
    assert first.path == "/hook?a=1"
    assert (first.message["type"], last.message["type"]) == ("run.attempt_started", "run.failed")
    assert last.message["data"] == {
        "run_id": run.run_id,
        "labels": {"team": "vision"},
        "state": "failed",
        "attempt": 1,
        "seq": 4,
        "reason": "user_code",
        "message": "it raised",
        "url": f"https://wa.example/v1/runs/{run.run_id}",
    }
    assert abs(int(last.headers["webhook-timestamp"]) - time.time()) < 60
    assert list(list_telling(store)) == []


def test_a_published_average_is_told_with_its_figures(store: MemoryStore, receiver: Receiver) -> None:
    """Every generation that can be downloaded is an event, the one of an average added after the end too."""
    run = HookedRun(store, Webhook(url=receiver.url, events=["published"]))
    told = notifier(store)
    run.start().checkpoint(20)
    run.fold(body=b"one", loss=0.5)
    settle(told)
    run.end()
    settle(told)
    add_average(store, run.run_id, AverageRequest(name="late", rule="swa"), clock=run.clock)
    run.fold("late", body=b"two", loss=0.25)
    settle(told)

    first, second = receiver.wait_for(2)
    data = first.message["data"]
    assert (data["average"], data["generation"], data["step"], data["loss"]) == ("swa", 1, 20, 0.5)
    assert (data["won"], data["is_best"]) == ("tie", True)
    assert data["url"] == f"/v1/runs/{run.run_id}/averages/swa?generation=1"
    assert second.message["data"]["average"] == "late"
    assert first.message_id != second.message_id


def test_a_receiver_that_fails_is_tried_again_under_the_same_id(store: MemoryStore, receiver: Receiver) -> None:
    """After a 500, and after a redirect, which is not followed, the same message comes again, later each time."""
    clock = ManualClock(SystemClock().now())
    receiver.statuses, receiver.headers = [500, 302], {"Location": f"{receiver.url}/elsewhere"}
    run = HookedRun(store, Webhook(url=receiver.url, events=["attempt_started"]))
    told = notifier(store, clock=clock)
    run.start()
    settle(told)
    clock.advance(2.4)
    settle(told)
    assert len(receiver.received) == 1  # it is not due before half of 5 seconds
    clock.advance(0.2)
    settle(told)
    clock.advance(9.9)
    settle(told)
    assert len(receiver.received) == 2
    clock.advance(0.2)
    settle(told)
    clock.advance(86_400)
    settle(told)

    assert len({each.message_id for each in receiver.received}) == 1
    assert len({each.body for each in receiver.received}) == 1
    assert [each.path for each in receiver.received] == ["/"] * 3
    assert list_deliveries(store, run.run_id) == {(0, "log-0000000002")}
    written = fetch_delivery(store, run.run_id, webhook=0, event_id="log-0000000002")
    assert (written.outcome, written.num_tries) == ("delivered", 3)


def test_a_message_is_given_up_after_a_day(store: MemoryStore, receiver: Receiver) -> None:
    """Tries go on for a day and no longer; a receiver that says 410 is not asked again at all."""
    clock = ManualClock(SystemClock().now())
    receiver.statuses = [410] + [503] * 100
    run = HookedRun(store, Webhook(url=receiver.url, events=["attempt_started", "failed"]))
    told = notifier(store, clock=clock)
    run.start()
    settle(told)
    run.end()
    for _ in range(200):
        settle(told)
        clock.advance(1000)

    gone, *failing = receiver.received
    assert gone.message["type"] == "run.attempt_started"
    assert 8 <= len(failing) <= 20
    assert {each.message["type"] for each in failing} == {"run.failed"}
    key = layout.delivery(run.run_id, webhook=0, event_id="log-0000000003")
    given_up = Delivery.model_validate_json(store.get(key))
    assert (given_up.outcome, given_up.status) == ("given_up", 503)
    assert list(list_telling(store)) == []


def test_one_dead_receiver_holds_up_no_other(store: MemoryStore, receiver: Receiver) -> None:
    """While one address refuses connections, the other is told at once."""
    with receiving() as other:
        dead = other.url
    run = HookedRun(
        store,
        Webhook(url=dead, events=["attempt_started"]),
        Webhook(url=receiver.url, events=["attempt_started"]),
    )
    run.start()

    settle(notifier(store))

    assert receiver.wait_for(1)[0].message_id.startswith(f"{run.run_id}-1-")
    assert list_deliveries(store, run.run_id) == {(1, "log-0000000002")}


def test_two_notifiers_tell_under_one_id(store: MemoryStore, receiver: Receiver) -> None:
    """Two that work side by side may both tell, and then with one id; afterwards neither tells again."""
    run = HookedRun(store, Webhook(url=receiver.url, events=["attempt_started"]))
    run.start()
    one, other = notifier(store), notifier(store)

    one.tick()
    other.tick()
    settle(one)
    settle(other)
    settle(notifier(store))

    assert len({each.message_id for each in receiver.received}) == 1
    assert len(receiver.received) == 2
    assert len(list_deliveries(store, run.run_id)) == 1


def test_nothing_is_sent_again_because_the_store_is_away(store: MemoryStore, receiver: Receiver) -> None:
    """Fault F10: a message that was taken while the store is away is written down later, not sent again."""
    faulty = FaultyStore(store)
    run = HookedRun(store, Webhook(url=receiver.url, events=["attempt_started"]))
    run.start()
    told = notifier(faulty)
    told.tick()
    receiver.wait_for(1)
    faulty.is_away = True
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            told.tick()
        except TransientError:
            break
    faulty.is_away = False
    settle(told)

    assert len(receiver.received) == 1
    assert list_deliveries(store, run.run_id) == {(0, "log-0000000002")}


def test_a_run_that_cannot_be_read_holds_up_no_other(store: MemoryStore, receiver: Receiver) -> None:
    """A damaged log stops its own run's webhooks alone."""
    broken = HookedRun(store, Webhook(url=receiver.url, events=["attempt_started"]))
    store.put(layout.log_entry(broken.run_id, 1), b"{}")
    sound = HookedRun(store, Webhook(url=receiver.url, events=["attempt_started"]))
    sound.start()

    settle(notifier(store))

    assert [each.message["data"]["run_id"] for each in receiver.wait_for(1)] == [sound.run_id]


def test_what_is_pending_is_told_to_prometheus(store: MemoryStore, receiver: Receiver) -> None:
    """Messages that wait to be tried again, and how old the oldest is, can be scraped."""
    receiver.statuses = [500] * 10
    run = HookedRun(store, Webhook(url=receiver.url, events=["attempt_started"]))
    run.start()
    settle(notifier(store))

    assert REGISTRY.get_sample_value("wa_notifier_pending_messages") == 1
    assert (REGISTRY.get_sample_value("wa_notifier_oldest_pending_seconds") or -1) >= 0


@pytest.mark.parametrize("ending", [Cancelled(), TrainingFinished(step=3)])
def test_every_way_to_end_is_an_event(store: MemoryStore, receiver: Receiver, ending: Any) -> None:
    """Cancelled runs and finished training are told as well, to those who asked."""
    run = HookedRun(store, Webhook(url=receiver.url, events=EVERYTHING[1:]))
    run.log.append(AttemptStarted(runner_id="test"))
    run.log.append(CancelRequested())
    run.log.append(ending)

    settle(notifier(store))

    assert [each.message["type"] for each in receiver.received] == [f"run.{ending.kind}"]


def test_a_notifier_killed_between_sending_and_writing_down_sends_again(
    tmp_path: Path, receiver: Receiver
) -> None:
    """SIGKILL while the receiver has the message: the next notifier sends it again, once, under the same id."""
    store = LocalStore(tmp_path / "bucket")
    run = HookedRun(store, Webhook(url=receiver.url, events=["attempt_started"]))
    run.start()
    first = notifier_process(tmp_path)
    receiver.on_request = lambda: os.kill(first.pid, signal.SIGKILL)
    receiver.wait_for(1, seconds=60)
    first.communicate(timeout=60)
    receiver.on_request = lambda: None
    second = notifier_process(tmp_path)
    try:
        receiver.wait_for(2, seconds=60)
        eventually(lambda: list_deliveries(store, run.run_id), what="its note of the delivery")
        second.send_signal(signal.SIGTERM)
        _, said = second.communicate(timeout=60)
    finally:
        second.kill()

    one, again = receiver.received
    assert (one.message_id, one.body, one.is_signed) == (again.message_id, again.body, again.is_signed)
    assert second.returncode == 0
    assert SECRET.encode() not in said
    assert KEY not in said
    assert b"/hook" not in said


def notifier_process(folder: Path) -> subprocess.Popen[bytes]:
    """`python -m services.notifier` on the bucket in `folder`."""
    settings = {
        "WA_STORE_URL": f"file://{folder / 'bucket'}",
        "WA_WEBHOOK_SECRET": SECRET,
        "WA_WEBHOOK_ALLOW_PRIVATE": "1",
        "WA_LOG_FORMAT": "json",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "services.notifier"], env=os.environ | settings, stderr=subprocess.PIPE
    )
