"""`wa open`: the page of the service, or of one run, in a browser; its address where there is none."""

from __future__ import annotations

import os
import sys
import webbrowser
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer

from services.cli.completion import complete_run
from services.cli.connection import connect, service_of
from services.cli.console import answer, print_json, say
from services.cli.options import ApiUrl, AsJson, Token

if TYPE_CHECKING:
    from collections.abc import Mapping


def open_page(
    run_id: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]",
            help="A run's id; without it, the list of runs.",
            show_default=False,
            autocompletion=complete_run,
        ),
    ] = None,
    *,
    is_printed: Annotated[bool, typer.Option("--print", help="Only print the address.")] = False,
    as_json: AsJson = False,
    api_url: ApiUrl = None,
    token: Token = None,
) -> None:
    """Open the page of the service, or of a run, in a browser.

    Prints the address too; where there is no browser, that is all.

    Example: wa open

    Example: wa open RUN --print
    """
    with connect(api_url, token) as client:
        client.version()
        if run_id is not None:
            client.run(run_id)
        url = f"{client.base_url}/" + (f"runs/{quote(run_id, safe='')}" if run_id else "")
    is_opened = not is_printed and not as_json and has_browser() and webbrowser.open(url)
    print_json({"url": url}) if as_json else answer(url)
    if is_opened and service_of(api_url, token)[1]:
        say("if the page asks for a token: it is that of this command (`wa env` prints that of a local stack)")


def has_browser(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a window can be opened here; a browser of text would take the terminal away."""
    if sys.platform in {"darwin", "win32"}:
        return True
    return bool(environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY") or environ.get("BROWSER"))
