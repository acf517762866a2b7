"""`wa demo`: the whole story from nothing. Embedded stack, a real run, averaged weights, one table, no trace.

Whatever happens on the way, the stack is stopped; and should this very process be killed, the stack notices
and ends by itself.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.cli.connection import DEFAULT_DATA
from services.cli.console import answer, print_table, say, shown
from services.cli.follow import follow, verdict
from services.cli.results import download_weights
from services.cli.runs import FOLLOW_PATIENCE_S, explain_end
from services.client import Client
from services.stack.detached import start_detached, stop_stack
from services.stack.embedded import StackOptions
from wa_core.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType
    from typing import NoReturn

    from services.client.calls import Json
    from services.stack.state import Connection

REQUEST = {
    "recipe": "services.recipes.digits:Digits",
    "config": {"epochs": 12},
    "scaling": {"num_workers": 2},
    "checkpoint": {"every_steps": 20},
    "averages": [{"name": "swa", "rule": "swa:start_step=100"}, {"name": "ema", "rule": "ema:half_life=60"}],
    "labels": {"made-by": "demo"},
}


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the averaged weights go.")] = Path("out"),
    *,
    is_kept: Annotated[
        bool, typer.Option("--keep", help="Keep runs and weights in ./.wa, for a later `wa up`.")
    ] = False,
) -> None:
    """Everything at once: start, train, average, download, stop.

    A small net on handwritten digits, with two workers; under 3 minutes.

    Example: wa demo --out out
    """
    began = time.monotonic()
    _prepare(out)
    say("starting S3 store, Ray, runner, averager and API on this machine …")
    with (
        _stack(is_kept=is_kept) as found,
        Client(found.api_url, token=found.token, patience_s=FOLLOW_PATIENCE_S) as client,
    ):
        say(f"ready after {time.monotonic() - began:.0f} s; training digits with 2 DDP workers")
        run = follow(client, client.submit(REQUEST)["run_id"])
        explain_end(client, run)
        if run["state"] != "succeeded":
            raise typer.Exit(1)
        averages = client.averages(run["run_id"])
        for average in averages:
            download_weights(client, run["run_id"], average["name"], out / f"{average['name']}.safetensors")
    print_table(["WEIGHTS", "N\naveraged", *_HEADINGS], table_rows(run, averages), title="Held-out data")
    answer("before: BatchNorm statistics pooled over the checkpoints; after: recalibrated for the average")
    for average in averages:
        answer(f"{average['name'].upper()} — {verdict(average) or 'not compared'}")
    for average in averages:
        answer(f"wrote {out / average['name']}.safetensors")
    say(f"done in {time.monotonic() - began:.0f} s; nothing is left running")


_HEADINGS = ["ACCURACY\nbefore", "ACCURACY\nafter", "LOSS\nbefore", "LOSS\nafter"]


def table_rows(run: Json, averages: Sequence[Json]) -> list[list[object]]:
    """One row for the newest raw weights, one for each average; raw weights need no recalibration."""
    raw = next((one["evaluation"]["raw"] for one in averages if one["evaluation"]["raw"]), None)
    rows: list[list[object]] = [[f"raw, step {run['step']}", None, *_numbers(raw, raw)]]
    for average in averages:
        evaluation = average["evaluation"]
        numbers = _numbers(evaluation["before_recalibration"], evaluation["averaged"])
        rows.append([f"{average['name'].upper()} {average['rule']}", average["n_averaged"], *numbers])
    return rows


def _numbers(before: Json | None, after: Json | None) -> list[object]:
    return [
        None if measured is None or name not in measured else _rounded(measured[name])
        for name in ("accuracy", "loss")
        for measured in (before, after)
    ]


def _rounded(value: float) -> str:
    return shown(value) if abs(value) < 0.01 else f"{value:.4f}"  # noqa: PLR2004  four digits either way


def _prepare(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ConfigurationError(
            f"cannot write to {out}: {error.strerror or error}; choose another folder with --out"
        ) from None


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt  # SIGTERM ends the demo as Ctrl-C does


@contextlib.contextmanager
def _stack(*, is_kept: bool) -> Iterator[Connection]:
    """A stack that ends with the block, tied to this process."""
    signal.signal(signal.SIGTERM, _interrupt)
    with contextlib.ExitStack() as steps:
        data = DEFAULT_DATA
        if not is_kept:
            data = Path(tempfile.mkdtemp(prefix="wa-demo-"))
            steps.callback(shutil.rmtree, data, ignore_errors=True)
        found = start_detached(StackOptions(data=data), is_tied=True)
        # Only now: a stack that somebody else runs on the folder is not ours to stop.
        steps.callback(_stop, data)
        yield found


def _stop(data: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C must not leave the rest behind
    say("stopping everything …")
    stop_stack(data)
