"""The commands about what a run says while it goes on: its log and what its workers write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.connection import connect
from services.cli.console import answer, print_json, shown
from services.cli.options import ApiUrl, AsJson, RunId, Token
from services.cli.runs import FOLLOW_PATIENCE_S, leaving, short_time

if TYPE_CHECKING:
    from services.client.calls import Json

Followed = Annotated[bool, typer.Option("--follow", "-f", help="Wait for more until the run has ended.")]


def logs(
    run_id: RunId,
    *,
    rank: Annotated[str, typer.Option(help="A worker's rank, or driver.")] = "0",
    is_followed: Followed = False,
    as_json: AsJson = False,
    api_url: ApiUrl = None,
    token: Token = None,
) -> None:
    """Print what a worker of the run wrote.

    Example: wa logs RUN -f

    Example: wa logs RUN --rank driver --json
    """
    patience_s = FOLLOW_PATIENCE_S if is_followed else 0.0
    with connect(api_url, token, patience_s=patience_s) as client, leaving(run_id):
        found = client.follow_logs(run_id, rank=rank) if is_followed else client.all_logs(run_id, rank=rank)
        for line in found:
            print_json(line) if as_json else answer(line["text"])


def events(
    run_id: RunId,
    *,
    is_followed: Followed = False,
    as_json: AsJson = False,
    api_url: ApiUrl = None,
    token: Token = None,
) -> None:
    """Print the run's log: attempts, checkpoints, the end.

    Example: wa events RUN -f

    Example: wa events RUN --json
    """
    patience_s = FOLLOW_PATIENCE_S if is_followed else 0.0
    with connect(api_url, token, patience_s=patience_s) as client, leaving(run_id):
        found = client.follow_events(run_id) if is_followed else client.all_events(run_id)
        for event in found:
            print_json(event) if as_json else answer(_event_line(event))


def _event_line(event: Json) -> str:
    known = {"seq", "at", "kind", "state", "attempt", "format", "write_id", "previous", "files", "spec_digest"}
    rest = "  ".join(f"{name} {shown(value)}" for name, value in event.items() if name not in known and value)
    return f"{event['seq']:>5}  {short_time(event['at'])}  {event['kind']:<17}  {rest}".rstrip()
