"""Webhooks: who wants to be told of what, and what has been told."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, Field, StringConstraints

from wa_core.records.base import FORMAT, Record, Request, new_write_id

#: What a receiver can be told of: entries of a run's log by their kind, and averages that can be downloaded.
WebhookEvent = Literal[
    "attempt_started",
    "attempt_failed",
    "paused",
    "training_finished",
    "succeeded",
    "failed",
    "cancelled",
    "published",
]

MAX_WEBHOOKS = 8


# No user name or password, which would be there for all to read, and no fragment, which is never sent.
_URL = re.compile(r"""https?://[A-Za-z0-9._:\[\]-]+(?:[/?][!"$-~]*)?""")


def _check_url(text: str) -> str:
    if not _URL.fullmatch(text):
        raise ValueError(
            "this is no address to post to; write http(s)://host/path in ASCII, without a user name, password or #"
        )
    return text


def _endings() -> list[WebhookEvent]:
    return ["succeeded", "failed", "cancelled"]


class Webhook(Request):
    """An address to which events of a run are posted. Whoever reads the run's records reads it too."""

    url: Annotated[str, StringConstraints(max_length=2000), AfterValidator(_check_url)]
    events: list[WebhookEvent] = Field(default_factory=_endings, min_length=1, max_length=8)


class Delivery(Record):
    """What became of one event for one webhook, written once: after this nothing is sent any more (ADR 22).

    `webhook` is the place in the submission's list, from 0. `status` is the receiver's last one, if it gave any.
    `num_tries` are those of the notifier that wrote this down, as no other's are known; 0 is unknown.
    """

    format: Literal[1] = FORMAT
    run_id: str
    webhook: int = Field(ge=0)
    event_id: str
    write_id: str = Field(default_factory=new_write_id)
    at: AwareDatetime
    outcome: Literal["delivered", "given_up"]
    status: int | None = None
    message: str = ""
    num_tries: int = Field(default=0, ge=0)
