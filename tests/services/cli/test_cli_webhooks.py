"""Webhooks from the command line: asked for at submission, and what became of their messages."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from services.api.examples import DELIVERY
from support.command import RUN_ID, run_resource

if TYPE_CHECKING:
    from support.command import Service, Wa

PATH = f"/v1/runs/{RUN_ID}/deliveries"
PENDING = DELIVERY | {"delivery_id": "01-x", "webhook": 1, "outcome": "pending", "at": None, "status": None}


def test_a_submission_names_its_webhooks(wa: Wa, service: Service) -> None:
    """Each address is sent with the events wanted; without any, with the service's own choice."""
    service.says("/v1/runs", run_resource(state="queued"), method="POST", status=202)
    urls = ("--webhook", "https://a.example/x", "--webhook", "https://b.example")

    wa("submit", "digits", *urls, "--webhook-event", "failed", "--webhook-event", "published")
    wa("submit", "digits", *urls[:2])

    events = ["failed", "published"]
    sent = [body.get("webhooks") for _, _, body in service.requests]
    assert sent == [
        [{"url": "https://a.example/x", "events": events}, {"url": "https://b.example", "events": events}],
        [{"url": "https://a.example/x"}],
    ]


def test_events_for_nobody_are_wrong_usage(wa: Wa, service: Service) -> None:
    """Exit 2 with the option, and nothing is submitted."""
    done = wa("submit", "digits", "--webhook-event", "failed")

    assert (done.returncode, service.requests) == (2, [])
    assert "'--webhook-event'" in done.stderr


def test_what_became_of_the_messages(wa: Wa, service: Service) -> None:
    """A line for each message, on all pages; `--json` has them as the service gives them."""
    pages = [
        {"data": [DELIVERY], "has_more": True, "next": DELIVERY["delivery_id"]},
        {"data": [PENDING], "has_more": False, "next": None},
    ]
    service.says(PATH, *pages)
    shown = wa("deliveries", RUN_ID)
    service.says(PATH, *pages)
    listed = wa("deliveries", RUN_ID, "--json")

    assert shown.returncode == 0, shown.stderr
    _, first, second = shown.stdout.splitlines()
    assert first.split() == [
        "0",
        "example.com",
        "succeeded",
        "delivered",
        "204",
        "1",
        "2026-11-25",
        "08:40:00",
        "-",
    ]
    assert second.split()[3] == "pending"
    assert json.loads(listed.stdout) == {"data": [DELIVERY, PENDING]}


def test_a_run_that_tells_nobody_says_so(wa: Wa, service: Service) -> None:
    """Nothing on stdout, and the reason on stderr."""
    service.says(PATH, {"data": [], "has_more": False, "next": None})

    done = wa("deliveries", RUN_ID)

    assert (done.returncode, done.stdout) == (0, "")
    assert "no webhooks" in done.stderr
