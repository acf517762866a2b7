"""What became of the messages to a run's webhooks, over REST."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from support.api import ApiRun
from wa_core.catalog.deliveries import average_event_id, commit_delivery, log_event_id
from wa_core.catalog.runs import submit
from wa_core.clock import SystemClock
from wa_core.records import AverageRequest, Delivery, Failed, RunRequest, Webhook

if TYPE_CHECKING:
    from typing import Literal

    from fastapi.testclient import TestClient

    from wa_core.store.memory import MemoryStore

HOOKS = [
    Webhook(url="https://example.com/a-secret-path", events=["failed", "published"]),
    Webhook(url="https://other.example/", events=["failed"]),
]


def hooked(store: MemoryStore) -> ApiRun:
    """A run with two webhooks, of which one average is out, and which has failed."""
    averages = [AverageRequest(name="swa", rule="swa")]
    request = RunRequest(recipe="services.recipes.digits:Digits", averages=averages, webhooks=HOOKS)
    run = ApiRun(store, run_id=submit(store, request, clock=SystemClock()).run_id).start()
    run.checkpoint(20)
    run.fold(body=b"weights")
    run.log.append(Failed(reason="user_code", message="it raised"))
    return run


def tell(
    run: ApiRun, webhook: int, event_id: str, *, outcome: Literal["delivered", "given_up"], **fields: Any
) -> None:
    """What the notifier writes down."""
    at = SystemClock().now()
    told = Delivery(run_id=run.run_id, webhook=webhook, event_id=event_id, at=at, outcome=outcome, **fields)
    commit_delivery(run.store, told)


def test_each_message_has_its_outcome(api: TestClient, store: MemoryStore) -> None:
    """Delivered with the status, given up with the reason, else pending; hosts are shown, addresses are not."""
    run = hooked(store)
    tell(run, 0, average_event_id("swa", 1), outcome="delivered", status=204, num_tries=2)
    tell(run, 1, log_event_id(run.log.entries[-1].seq), outcome="given_up", message="ConnectionRefusedError")

    answer = api.get(f"/v1/runs/{run.run_id}/deliveries")

    shown = ("webhook", "host", "event", "outcome", "status", "num_tries", "message")
    assert [tuple(one[name] for name in shown) for one in answer.json()["data"]] == [
        (0, "example.com", "published", "delivered", 204, 2, ""),
        (0, "example.com", "failed", "pending", None, None, ""),
        (1, "other.example", "failed", "given_up", None, None, "ConnectionRefusedError"),
    ]
    assert "a-secret-path" not in answer.text


def test_messages_come_in_pages(api: TestClient, store: MemoryStore) -> None:
    """`next` leads through all of them, each once."""
    run, found, after = hooked(store), [], ""
    while after is not None:
        page = api.get(f"/v1/runs/{run.run_id}/deliveries", params={"limit": 1, "after": after}).json()
        found += [one["event"] for one in page["data"]]
        assert page["has_more"] == (page["next"] is not None)
        after = page["next"]

    assert found == ["published", "failed", "failed"]


def test_a_run_without_webhooks_has_none(api: TestClient, store: MemoryStore) -> None:
    """An empty list for a run that tells nobody, 404 for one that is not there, 422 for a cursor that is none."""
    run = ApiRun(store).start()
    url = f"/v1/runs/{run.run_id}/deliveries"

    assert api.get(url).json() == {"data": [], "has_more": False, "next": None}
    assert api.get("/v1/runs/01J0000000000000000000000A/deliveries").json()["code"] == "run_not_found"
    assert api.get(url, params={"after": "../x"}).status_code == 422
