"""`wa deliveries`: what a run's webhooks were told, and what they answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.cli.connection import connect
from services.cli.console import print_json, print_table, say
from services.cli.options import ApiUrl, AsJson, RunId, Token
from services.cli.runs import short_time

if TYPE_CHECKING:
    from services.client.calls import Json


def deliveries(run_id: RunId, *, as_json: AsJson = False, api_url: ApiUrl = None, token: Token = None) -> None:
    """List the messages to a run's webhooks.

    Each is delivered, given up, or pending: not sent yet, or tried again for a day.

    Example: wa deliveries RUN
    """
    with connect(api_url, token) as client:
        found = list(client.all_deliveries(run_id))
    if as_json:
        print_json({"data": found})
        return
    if not found:
        say("nothing to tell: the run has no webhooks, or nothing that they want to know has happened yet")
        return
    columns = ["WEBHOOK", "HOST", "EVENT", "OUTCOME", "STATUS", "TRIES", "AT", "WHY"]
    print_table(columns, [_row(one) for one in found])


def _row(one: Json) -> list[object]:
    at = short_time(one["at"]) if one["at"] else None
    names = ("webhook", "host", "event", "outcome", "status", "num_tries")
    return [*(one[name] for name in names), at, one["message"] or None]
