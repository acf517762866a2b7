"""`wa predict`: asks a published average what it makes of inputs in a file, or on stdin."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from services.cli.arguments import parse_json
from services.cli.completion import complete_average
from services.cli.connection import connect
from services.cli.console import print_json, say
from services.cli.options import ApiUrl, AsJson, PublishedState, RunId, Token
from services.cli.results import chosen_query

if TYPE_CHECKING:
    from collections.abc import Sequence

_PLACE = "FILE"


def predict(
    run_id: RunId,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The average.", autocompletion=complete_average)],
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON with the inputs; - is stdin.", show_default=False)
    ] = Path("-"),
    *,
    at: PublishedState = "latest",
    as_json: AsJson = False,
    api_url: ApiUrl = None,
    token: Token = None,
) -> None:
    """Ask an average what it makes of some inputs.

    The inputs are a JSON list of what the run's recipe takes, or {"instances": [...]} as the REST API takes them.
    Prints one prediction a line, in order.

    Example: echo '[{"prompt": "The data set"}]' | wa predict RUN swa

    Example: wa predict RUN swa images.json --at best --json
    """
    instances = _instances(file)
    with connect(api_url, token) as client:
        said = client.predict(run_id, name, instances, **chosen_query(at))
    if as_json:
        print_json(said)
        return
    for prediction in said.predictions:
        print_json(prediction)
    say(f"said by {name}, generation {said.generation}")


def _instances(file: Path) -> Sequence[object]:
    """What is asked, from a list or from the body of a request."""
    said = parse_json(_text(file), place=_PLACE)
    instances = said.get("instances") if isinstance(said, dict) else said
    if not isinstance(instances, list):
        _refuse('write a list of inputs, or {"instances": [...]}; docs/guides/predict.md has what recipes take')
    if not instances:
        _refuse("there are no inputs in it")
    return instances


def _text(file: Path) -> str:
    is_stdin = file == Path("-")
    if is_stdin and sys.stdin.isatty():
        _refuse("name a file of inputs, or pipe them in")
    try:
        content = sys.stdin.buffer.read() if is_stdin else file.read_bytes()
        return content.decode()
    except OSError as error:
        _refuse(f"cannot read {file}: {error.strerror or error}")
    except UnicodeDecodeError:
        _refuse(f"{'stdin' if is_stdin else file} is no UTF-8 text")


def _refuse(message: str) -> NoReturn:
    raise typer.BadParameter(message, param_hint=f"'{_PLACE}'")
