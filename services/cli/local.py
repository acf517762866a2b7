"""The commands about this machine: the embedded stack up, down and how to reach it, the version."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.connection import DEFAULT_DATA
from services.cli.console import answer, print_json, say
from services.cli.options import AsJson
from services.runtime.telemetry import configure_logging
from services.stack.detached import start_detached, stop_stack
from services.stack.embedded import StackOptions, StoppedEarlyError, StopSignals, run_stack
from services.stack.state import DataFolder

if TYPE_CHECKING:
    from services.stack.state import Connection

Data = Annotated[Path, typer.Option("--data", metavar="DIR", help="Data folder; state in it survives.")]


def up(
    *,
    data: Data = DEFAULT_DATA,
    is_detached: Annotated[
        bool, typer.Option("--detach", "-d", help="Go to the background once everything is ready.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the API.", show_default="a free one")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Start the service on this machine, with all that it needs.

    That is an S3 store, Ray, runner, averager, predictor and API. Without --detach it stays in the foreground
    until Ctrl-C. State in the data folder survives.

    Example: wa up --detach
    """
    options = StackOptions(data=data, api_port=port)
    if is_detached:
        say("starting (about 10 s) …")
        _announce(start_detached(options), as_json=as_json, data=data, is_detached=True)
        return
    configure_logging("stack", log_format=os.environ.get("WA_LOG_FORMAT", "console"))
    say("starting (about 10 s); Ctrl-C stops everything …")
    stop = StopSignals().install()
    try:
        run_stack(
            options,
            stop=stop,
            environment=os.environ,
            on_ready=lambda found: _announce(found, as_json=as_json, data=data, is_detached=False),
        )
    except StoppedEarlyError as stopped:
        say(stopped.message)
    else:
        say(f"stopped; state is kept in {data}")


def down(*, data: Data = DEFAULT_DATA, as_json: AsJson = False) -> None:
    """Stop what `wa up` started.

    Cleans up too after a stack that was killed. State in the data folder stays.

    Example: wa down
    """
    report = stop_stack(data)
    if as_json:
        print_json({"stopped": report.stopped, "leftovers": list(report.leftovers)})
    elif report.stopped is not None:
        names = ", ".join(name for name in report.stopped if name != "supervisor")
        answer(f"stopped {names} (supervisor {report.supervisor_pid}); state is kept in {data}")
    elif report.leftovers:
        answer(f"the supervisor had been killed; ended {len(report.leftovers)} processes that it left behind")
    else:
        answer(f"nothing runs on {data}")


def env(*, data: Data = DEFAULT_DATA, as_json: AsJson = False) -> None:
    """Print how to reach the service that runs on this machine.

    As lines for a shell: address and token of the API, and address and keys of its bucket, which are secrets.
    curl, the Python client, trainers of your own and commands in other folders go by them.

    Example: eval "$(wa env)"
    """
    from services.client import ServiceUnreachableError

    found = DataFolder(data.resolve()).connection()
    if found is None:
        raise ServiceUnreachableError(f"nothing runs on {data}; start it with `wa up`, or name another --data")
    if as_json:
        print_json(asdict(found))
        return
    for name, value in variables(found).items():
        answer(f"export {name}={shlex.quote(value)}")


def variables(found: Connection) -> dict[str, str]:
    """The environment in which a program finds the service and its bucket."""
    return {
        "WA_API_URL": found.api_url,
        "WA_TOKEN": found.token,
        "WA_STORE_URL": f"s3://{found.bucket}",
        "WA_S3_ENDPOINT": found.s3_endpoint,
        "WA_S3_ACCESS_KEY": found.access_key,
        "WA_S3_SECRET_KEY": found.secret_key,
    }


def show_version(*, as_json: AsJson = False) -> None:
    """Print the version of this installation.

    Example: wa version
    """
    found = installed("weight-averaging") or "unknown"
    print_json({"version": found}) if as_json else answer(found)


def installed(distribution: str) -> str | None:
    """The version of an installed package, without importing it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _announce(found: Connection, *, as_json: bool, data: Path, is_detached: bool) -> None:
    if as_json:
        print_json(asdict(found))
        return
    answer(f"API    {found.api_url}")
    answer(f"S3     {found.s3_endpoint}, bucket {found.bucket}")
    answer(f"logs   {data / 'logs'}")
    elsewhere = "" if data == DEFAULT_DATA else f" --data {data}"
    # Left over from an earlier stack, a variable would lead commands there, also in this folder.
    if not elsewhere and os.environ.get("WA_API_URL", found.api_url) == found.api_url:
        say("Commands in this folder find it by themselves. Next: wa submit digits --average swa --follow")
    else:
        say(f'For other commands: eval "$(wa env{elsewhere})"')
    if is_detached:
        say(f"Stop it with: wa down{elsewhere}")
