"""The options and arguments that several commands share, with their help and what a shell offers after TAB.

Nothing is loaded for them but Typer: every command imports this module.
"""

from __future__ import annotations

from typing import Annotated

import typer

from services.cli.completion import complete_average, complete_run

ApiUrl = Annotated[
    str | None,
    typer.Option(
        "--api-url",
        envvar="WA_API_URL",
        help="Address of the service. Without it: the stack that `wa up` started in this folder.",
        metavar="URL",
        show_default=False,
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="WA_TOKEN", help="Bearer token of the service.", metavar="TOKEN", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs, on stdout.")]
RunId = Annotated[
    str,
    typer.Argument(
        help="The run's id, as `wa submit` and `wa runs` print it.", metavar="RUN", autocompletion=complete_run
    ),
]
OneAverage = Annotated[
    str | None,
    typer.Option(
        help="Which average. Not needed when the run has one.",
        show_default=False,
        autocompletion=complete_average,
    ),
]
PublishedState = Annotated[str, typer.Option(metavar="best|latest|STEP", help="Which of its published states.")]
