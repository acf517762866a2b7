"""The commands about what a run made: checkpoints, averages, downloads."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  Typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from services.cli.connection import connect
from services.cli.console import answer, bytes_bar, print_json, print_table, say
from services.cli.follow import measured_metrics, verdict
from services.cli.options import ApiUrl, AsJson, OneAverage, PublishedState, RunId, Token
from services.cli.runs import FOLLOW_PATIENCE_S
from wa_core.errors import AverageNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.client import Client
    from services.client.calls import Json

_MAX_DIGITS = 12


def checkpoints(run_id: RunId, *, as_json: AsJson = False, api_url: ApiUrl = None, token: Token = None) -> None:
    """List the run's checkpoints.

    Abandoned ones were left behind by a restart and are in no average.

    Example: wa checkpoints RUN
    """
    with connect(api_url, token) as client:
        found = client.checkpoints(run_id)
    columns = ["SEQ", "STEP", "EPOCH", "ATTEMPT", "LR", "BYTES", "ABANDONED", "METRICS"]
    _print_list(found, as_json=as_json, columns=columns, row=_checkpoint_row)


def averages(run_id: RunId, *, as_json: AsJson = False, api_url: ApiUrl = None, token: Token = None) -> None:
    """List the run's averages beside the raw weights.

    Both are measured on the same held-out data. WON is the verdict on averaged minus raw, with its 95 % interval:
    a tie when that has 0 in it.

    Example: wa averages RUN
    """
    with connect(api_url, token) as client:
        found = client.averages(run_id)
    columns = ["NAME", "RULE", "N_AVERAGED", "STEPS", "BEHIND", "AVERAGED", "RAW", "WON"]
    _print_list(found, as_json=as_json, columns=columns, row=_average_row)
    for one in found:
        for warning in one.get("warnings", []):
            say(f"{one['name']}: {warning}")


def download(  # noqa: PLR0913  one parameter for each option of the command
    run_id: RunId,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write.")],
    average: OneAverage = None,
    is_raw: Annotated[
        bool, typer.Option("--raw", help="The raw weights of a checkpoint, the newest unless --at STEP.")
    ] = False,
    at: PublishedState = "latest",
    file_format: Annotated[Literal["safetensors", "pt"], typer.Option("--format", help="File format.")] = (
        "safetensors"
    ),
    as_json: AsJson = False,
    api_url: ApiUrl = None,
    token: Token = None,
) -> None:
    """Download averaged weights, or raw ones, and check their digest.

    A download that was cut goes on where it was when the command is given again.

    Example: wa download RUN --average swa -o swa.safetensors

    Example: wa download RUN --average ema --at best --format pt -o ema.pt

    Example: wa download RUN --raw -o raw.safetensors
    """
    step = _raw_step(at, average=average, file_format=file_format) if is_raw else None
    with connect(api_url, token, patience_s=FOLLOW_PATIENCE_S) as client:
        if is_raw:
            with bytes_bar(output.name) as on_progress:
                client.download_raw(run_id, output, step=step, on_progress=on_progress)
            which: dict[str, object] = {"average": None, "weights": "raw"}
        else:
            name = average or only_average(client, run_id)
            download_weights(client, run_id, name, output, file=f"weights.{file_format}", at=chosen_state(at))
            which = {"average": name, "weights": "averaged"}
    if as_json:
        print_json({**which, "path": str(output), "size_bytes": output.stat().st_size})
    else:
        answer(str(output))


def _raw_step(at: str, *, average: str | None, file_format: str) -> int | None:
    """Which checkpoint `--raw` means; None is the newest."""
    if average is not None:
        raise typer.BadParameter("raw weights are in no average; leave --average out.", param_hint="'--raw'")
    if file_format != "safetensors":
        raise typer.BadParameter("raw weights are stored as safetensors alone.", param_hint="'--format'")
    state = chosen_state(at)
    if state == "best":
        raise typer.BadParameter(
            "of raw weights write latest or a step; `wa checkpoints RUN` lists them.", param_hint="'--at'"
        )
    return state if isinstance(state, int) else None


def download_weights(
    client: Client,
    run_id: str,
    name: str,
    output: Path,
    *,
    file: str = "weights.safetensors",
    at: str | int | None = None,
    generation: int | None = None,
) -> None:
    """Download with a bar, if a terminal is there."""
    with bytes_bar(output.name) as on_progress:
        client.download(run_id, name, output, file=file, at=at, generation=generation, on_progress=on_progress)


def chosen_state(text: str) -> str | int:
    """What `--at` means: best, latest, or the number of a step."""
    if text in {"best", "latest"}:
        return text
    if text.isdecimal() and len(text) <= _MAX_DIGITS:
        return int(text)
    raise typer.BadParameter(f"{text!r} is none of: best, latest, the number of a step.", param_hint="'--at'")


def chosen_query(text: str) -> dict[str, Any]:
    """What `--at` means, as the clients' methods take it."""
    state = chosen_state(text)
    return {"step": state} if isinstance(state, int) else {"at": state}


def only_average(client: Client, run_id: str) -> str:
    """The average that is meant when none is named."""
    names = [str(one["name"]) for one in client.averages(run_id)]
    if not names:
        raise AverageNotFoundError(f"run {run_id} has no averages; submit with --average to get some")
    if len(names) > 1:
        raise typer.BadParameter(
            f"run {run_id} has {len(names)} averages; choose one of: {', '.join(names)}.", param_hint="'--average'"
        )
    return names[0]


def _print_list(
    found: Sequence[Json], *, as_json: bool, columns: list[str], row: Callable[[Json], list[object]]
) -> None:
    if as_json:
        print_json({"data": found})
    else:
        print_table(columns, [row(one) for one in found])


def _checkpoint_row(one: Json) -> list[object]:
    numbers = [one[key] for key in ("seq", "step", "epoch", "attempt", "lr", "size_bytes")]
    return [*numbers, "yes" if one["is_abandoned"] else "no", one["metrics"]]


def _average_row(one: Json) -> list[object]:
    steps = None if one["first_step"] is None else f"{one['first_step']}..{one['last_step']}"
    measured = [measured_metrics(one, which) or None for which in ("averaged", "raw")]
    return [one["name"], one["rule"], one["n_averaged"], steps, one["behind"], *measured, verdict(one) or None]
