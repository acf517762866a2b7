"""`wa rebuild`: one more average of a run, also of one that has ended; predicted, and on request waited for."""

from __future__ import annotations

import time
from pathlib import Path  # noqa: TC003  Typer reads the annotations at run time
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from services.cli.arguments import check_name, name_of_rule
from services.cli.connection import connect
from services.cli.console import INTERRUPTED, answer, print_json, print_table, say
from services.cli.follow import POLL_S, average_line
from services.cli.options import ApiUrl, AsJson, RunId, Token
from services.cli.results import download_weights
from services.cli.runs import FOLLOW_PATIENCE_S
from services.client.answers import TERMINAL_STATES
from services.client.download import check_writable
from wa_core.errors import NoAverageYetError

if TYPE_CHECKING:
    from services.client import Client
    from services.client.calls import Json


def rebuild(  # noqa: PLR0913  one parameter for each option of the command
    run_id: RunId,
    *,
    rule: Annotated[str, typer.Option("--rule", "-r", help="Such as ema:half_life=500.", show_default=False)],
    name: Annotated[
        str | None, typer.Option(help="What to call the average.", show_default="made from the rule")
    ] = None,
    accumulator_dtype: Annotated[
        Literal["float64", "float32"], typer.Option(help="What is summed in.")
    ] = "float64",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Wait, and download it.", show_default=False),
    ] = None,
    is_followed: Annotated[bool, typer.Option("--follow", "-f", help="Wait until it is published.")] = False,
    is_dry: Annotated[bool, typer.Option("--dry-run", help="Say how it would be made, and how well.")] = False,
    as_json: AsJson = False,
    api_url: ApiUrl = None,
    token: Token = None,
) -> None:
    """Add an average to a run, also after its end.

    Where all its checkpoints are kept they are folded again, exactly. Where some are gone it is summed from what
    is kept, with an error that is said beforehand; or refused, if that is above 5 %.

    Example: wa rebuild RUN --rule ema:half_life=500 --dry-run

    Example: wa rebuild RUN --rule window:last=8,shape=cosine --name last8 -o last8.safetensors
    """
    chosen = name or name_of_rule(rule)
    check_name(chosen, place="--name")
    is_waited_for = (is_followed or output is not None) and not is_dry
    if output is not None:
        check_writable(output)
    with connect(api_url, token, patience_s=FOLLOW_PATIENCE_S if is_waited_for else 0.0) as client:
        added = client.add_average(run_id, chosen, rule, accumulator_dtype=accumulator_dtype, dry_run=is_dry)
        if not as_json:
            _tell(added["prediction"], is_dry=is_dry)
        average = _wait(client, run_id, chosen) if is_waited_for else added
        if output is not None and not is_dry:
            download_weights(client, run_id, chosen, output)
    if as_json:
        print_json({**average, "prediction": added["prediction"]})
    elif not is_dry:
        answer(chosen if output is None else str(output))


def _tell(prediction: Json, *, is_dry: bool) -> None:
    if is_dry:
        columns = ["HOW", "PROFILE_ERROR", "NOISE_GAIN", "FILES", "BYTES_READ"]
        keys = ("how", "profile_error", "noise_gain", "reads", "read_bytes")
        print_table(columns, [[prediction[key] for key in keys]])
        return
    files = f"{prediction['reads']} file{'' if prediction['reads'] == 1 else 's'}"
    if prediction["how"] == "replay":
        say(f"replayed from all its checkpoints ({files}): exact")
    else:
        error, gain = prediction["profile_error"], prediction["noise_gain"]
        say(f"rebuilt from what is kept ({files}): predicted error {error:.2%}, noise gain {gain:.3g}")


def _wait(client: Client, run_id: str, name: str) -> Json:
    """Wait until everything that there is now is in the average, and that is published."""
    said, caught_up = "", 0
    try:
        while True:
            average = client.average(run_id, name)
            if average["generation"] and not average["behind"]:
                caught_up = caught_up or average["generation"]
            if caught_up and (average["published_generation"] or 0) >= caught_up:
                return average
            _refuse_endless(client, run_id, average)
            if (line := average_line(average)) != said:
                say(line)
                said = line
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        say(f"stopped looking; the averager goes on with {name}. Look again with: wa averages {run_id}")
        raise typer.Exit(INTERRUPTED) from None


def _refuse_endless(client: Client, run_id: str, average: Json) -> None:
    """Nothing will ever be published of an average that counts nothing of a run that has ended."""
    is_empty = bool(average["generation"]) and not average["behind"] and not average["n_averaged"]
    if is_empty and client.run(run_id)["state"] in TERMINAL_STATES:
        raise NoAverageYetError(
            f"average {average['name']} ({average['rule']}) holds none of the run's checkpoints, so there is "
            f"nothing to publish: {len(average['skipped'])} are not counted by its rule, "
            f"{len(average['rejected'])} were rejected; ask for another rule"
        )
