"""`wa verify`: has an average recomputed from the kept checkpoints, and says whether it is what it says it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path  # noqa: TC003  typer needs it at run time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from services.cli.bucket import bucket_environment
from services.cli.completion import complete_average
from services.cli.connection import DEFAULT_DATA
from services.cli.console import answer, notices, print_json
from services.cli.options import AsJson, RunId
from wa_core.errors import CorruptError

if TYPE_CHECKING:
    from collections.abc import Iterable


def verify(
    run_id: RunId,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The average.", autocompletion=complete_average)],
    *,
    generation: Annotated[
        int | None, typer.Option(min=1, help="Which of its generations.", show_default="the newest")
    ] = None,
    data: Annotated[
        Path, typer.Option("--data", metavar="DIR", help="Data folder of the stack whose bucket it is.")
    ] = DEFAULT_DATA,
    as_json: AsJson = False,
) -> None:
    """Recompute an average from its checkpoints; compare every bit.

    What is compared is what is stored and what is served.

    Reads the bucket itself (WA_STORE_URL, WA_S3_ENDPOINT, WA_S3_ACCESS_KEY, WA_S3_SECRET_KEY, or the stack of
    this folder), not the API. Exit 1, with what differs or is missing, if it is not verified.

    Example: wa verify RUN swa
    """
    asked = [run_id, name, *([] if generation is None else [str(generation)])]
    process = subprocess.Popen(
        [sys.executable, "-m", "services.averager.verifying", *asked],
        env=bucket_environment(data),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        said = _last(process.stdout or [])
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
    if as_json:
        print_json(said)
    if "verified" not in said:
        error = said.get("error", {"code": "verify_failed", "message": "the verification ended without an answer"})
        raise CorruptError(f"not verified: {error['message']}", code=error["code"])
    if not as_json:
        answer(_sentence(said["verified"]))


def _last(lines: Iterable[str]) -> dict[str, Any]:
    """The answer, after showing how far it is."""
    said: dict[str, Any] = {}
    console = notices()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("folding checkpoints", total=None)
        for line in lines:
            said = json.loads(line)
            if "done" in said:
                progress.update(task, completed=said["done"], total=said["all"])
    return said


def _sentence(found: dict[str, Any]) -> str:
    steps, equal = found["steps"], []
    if found["is_state_equal"]:
        equal.append("the stored accumulators")
    if found["served_generation"] is not None:
        num = len(found["recalibrated"])
        equal.append("the served weights" + (f" (but for {num} recalibrated BatchNorm buffers)" if num else ""))
    return (
        f"verified: average {found['name']} of run {found['run_id']}, generation {found['generation']}, is that "
        f"of its {len(steps)} checkpoints (steps {steps[0]} to {steps[-1]}), each counted once; equal to the last "
        f"bit: {' and '.join(equal) or 'its coefficients, as nothing else is stored'}"
    )
