"""Webhooks in submissions: which are taken, and what is said of those that are not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from services.api.asked.webhooks import WebhookPolicy
from support.api import submission
from wa_core.catalog.deliveries import list_telling
from wa_core.catalog.runs import fetch_spec, list_run_ids

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from wa_core.store.memory import MemoryStore

URL = "https://example.com:8443/hooks?team=a"


def policy(api: TestClient, **fields: bool) -> None:
    """Let the service take webhooks."""
    api.app.state.webhooks = WebhookPolicy(is_on=True, **fields)  # type: ignore[attr-defined]


def test_webhooks_are_kept_and_not_shown(api: TestClient, store: MemoryStore) -> None:
    """A run keeps its webhooks for the notifier, which finds it by a marker; its resource shows no address."""
    policy(api)

    answer = api.post("/v1/runs", json=submission(webhooks=[{"url": URL}]))

    run_id = answer.json()["run_id"]
    (kept,) = fetch_spec(store, run_id).request.webhooks
    assert (kept.url, kept.events) == (URL, ["succeeded", "failed", "cancelled"])
    assert list(list_telling(store)) == [run_id]
    assert "example.com" not in answer.text + api.get(f"/v1/runs/{run_id}").text


def test_a_run_without_webhooks_has_nothing_to_tell(api: TestClient, store: MemoryStore) -> None:
    """No marker is written for runs that tell nobody."""
    api.post("/v1/runs", json=submission())

    assert list(list_telling(store)) == []


def test_a_service_that_tells_none_says_so(api: TestClient, store: MemoryStore) -> None:
    """Without a secret to sign with, webhooks are refused, not ignored."""
    answer = api.post("/v1/runs", json=submission(webhooks=[{"url": URL}]))

    assert (answer.status_code, answer.json()["code"]) == (422, "webhooks_off")
    assert "WA_WEBHOOK_SECRET" in answer.json()["detail"]
    assert list_run_ids(store) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://[::ffff:10.0.0.1]/",
        "https://localhost:9000/",
        "https://metadata.google.internal/",
        "https://example.com:0/",
        "https://example.com:99999/",
        "https://[oops/",
        "https://:443/",
    ],
)
def test_addresses_that_would_never_be_called_are_refused(api: TestClient, store: MemoryStore, url: str) -> None:
    """Plain http, private and impossible hosts and ports: 422 with the place."""
    policy(api)

    answer = api.post("/v1/runs", json=submission(webhooks=[{"url": URL}, {"url": url}]))

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_webhook")
    assert answer.json()["errors"][0]["pointer"] == "webhooks[1].url"
    assert list_run_ids(store) == []


def test_private_addresses_are_taken_where_the_operator_says_so(api: TestClient) -> None:
    """With WA_WEBHOOK_ALLOW_PRIVATE an intranet's plain http is fine."""
    policy(api, allow_private=True)

    assert api.post("/v1/runs", json=submission(webhooks=[{"url": "http://10.0.0.7/x"}])).status_code == 202


@pytest.mark.parametrize(
    "webhook",
    [
        {"url": "ftp://example.com/"},
        {"url": "https://user:hunter2@example.com/"},
        {"url": "https://example.com/#part"},
        {"url": "https://example.com/a b"},
        {"url": "https://example.com/\u202e"},
        {"url": "https://example.com/" + "a" * 2000},
        {"url": URL, "events": []},
        {"url": URL, "events": ["everything"]},
        {"url": URL, "secret": "whsec_x"},
        {},
    ],
)
def test_what_is_no_webhook_is_refused(api: TestClient, webhook: dict[str, Any]) -> None:
    """Passwords, fragments, odd characters, unknown events and fields: 422, and a password is not repeated."""
    policy(api)

    answer = api.post("/v1/runs", json=submission(webhooks=[webhook]))

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"].startswith("webhooks[0]")
    assert "hunter2" not in answer.text
