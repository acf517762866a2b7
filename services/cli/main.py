"""The `wa` command: one app, one outermost handler.

Exit codes: 0 done, 1 the run or check failed, 2 wrong usage, 3 service unreachable, 130 interrupted. No
traceback reaches a person, unless WA_DEBUG=1 asks for it.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, TextIO

import typer

from services.cli.completion import completed_command
from services.cli.console import INTERRUPTED, say
from services.cli.help_texts import ReadableGroup
from services.cli.suggestions import SuggestingCommand
from wa_core.errors import InvalidInputError, WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.client import ApiError

_HELP = """Averaged weights (SWA, EMA) for every training run.

All of it at once:  wa demo

Step by step:
  wa up --detach
  wa submit digits --average swa:start_step=100 --follow
  wa averages RUN
  wa download RUN --average swa -o swa.safetensors
  wa down

Without a service:
  wa average 'step_*.safetensors' --rule swa -o swa.safetensors
"""
_EPILOG = """Which service: --api-url and --token, or WA_API_URL and WA_TOKEN, or the stack of ./.wa.

Exit codes: 0 done, 1 the run or check failed, 2 wrong usage, 3 service unreachable."""

_FAILED, _USAGE, _UNREACHABLE = 1, 2, 3
_UNAUTHENTICATED = 401
_BAD_REQUEST = {400, 413, 415, 422}
_TOO_LITTLE_KEPT = "cannot_rebuild"  # nothing is wrong with how it was asked for

# Command -> where its function is, as module:function below services.cli. Only what is called is loaded: the
# client and the stack take longer to import than averaging a small model does.
_PANELS: dict[str, dict[str, str]] = {
    "Runs": {
        "submit": "runs:submit",
        "runs": "runs:runs",
        "show": "runs:show",
        "logs": "feeds:logs",
        "events": "feeds:events",
        "deliveries": "deliveries:deliveries",
        "pause": "runs:pause",
        "resume": "runs:resume",
        "cancel": "runs:cancel",
    },
    "Results": {
        "checkpoints": "results:checkpoints",
        "averages": "results:averages",
        "download": "results:download",
        "export": "export:export",
        "predict": "predict:predict",
        "open": "open:open_page",
        "rebuild": "rebuild:rebuild",
        "verify": "verify:verify",
    },
    "Files": {
        "average": "average:average",
    },
    "Service": {
        "tokens": "tokens:tokens",
    },
    "This machine": {
        "up": "local:up",
        "down": "local:down",
        "env": "local:env",
        "demo": "demo:demo",
        "doctor": "doctor:doctor",
        "bench": "bench:bench",
        "gc": "gc:gc",
        "version": "local:show_version",
    },
}


def build_app(called: str | None = None) -> typer.Typer:
    """The app, grouped as the help shows it: with the command `called` alone if there is one, or else with all."""
    app = typer.Typer(
        name="wa",
        cls=ReadableGroup,
        help=_HELP,
        epilog=_EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    is_known = any(called in commands for commands in _PANELS.values())
    for panel, commands in _PANELS.items():
        for name, place in commands.items():
            if name == called or not is_known:
                module, _, function = place.partition(":")
                command = getattr(import_module(f"services.cli.{module}"), function)
                if isinstance(command, typer.Typer):
                    app.add_typer(command, name=name, rich_help_panel=panel)
                else:
                    app.command(name, cls=SuggestingCommand, rich_help_panel=panel)(command)
    return app


def main(arguments: Sequence[str]) -> int:
    """Run one command, and return its exit code."""
    try:
        build_app(completed_command() or next(iter(arguments), None))(args=list(arguments), prog_name="wa")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except WeightAveragingError as error:
        return _explain(error)
    except Exception as error:  # noqa: BLE001  the outermost handler: no traceback reaches a person
        return _explain_unforeseen(error)
    return 0


def run() -> None:
    """The entry point of the `wa` script."""
    # Started in the background of a script, a program inherits that SIGINT is ignored; what `wa` says of Ctrl-C
    # (the run goes on, the stack is stopped) must hold there too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Closed by whoever started it (`wa runs >&-`), they are None: what nobody wants to read goes nowhere.
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    sys.exit(main(sys.argv[1:]))


def _nowhere() -> TextIO:
    return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def _root() -> None:
    pass  # makes the help above the app's own; without it a single command would be the app


def _explain(error: WeightAveragingError) -> int:
    """Say what went wrong, in as few lines as it takes, and return the exit code."""
    if os.environ.get("WA_DEBUG"):
        raise error
    say(f"wa: {error.message}")
    from services.client import ApiError, ServiceUnreachableError

    if isinstance(error, ServiceUnreachableError):
        return _UNREACHABLE
    if isinstance(error, ApiError):
        return _explain_refusal(error)
    is_usage = isinstance(error, InvalidInputError) and error.code != "output_not_writable"
    return _USAGE if is_usage else _FAILED


def _explain_unforeseen(error: Exception) -> int:
    if isinstance(error, BrokenPipeError):
        # Whoever read has seen enough, as in `wa events RUN | head`; Python must not flush into it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    if os.environ.get("WA_DEBUG"):
        raise error
    if isinstance(error, UnicodeEncodeError):
        say("wa: an argument is no UTF-8 text; only names of files may be such.")
        return _USAGE
    if isinstance(error, OSError) and error.strerror:
        # The machine's fault and not the program's: a full disk behind a pipe, a folder that is gone.
        say(f"wa: {error.strerror}" + (f": {error.filename}" if error.filename else ""))
        return _FAILED
    say(f"wa: unexpected {type(error).__name__}: {error}; WA_DEBUG=1 shows where. Please report it.")
    return _FAILED


def _explain_refusal(error: ApiError) -> int:
    for fault in error.errors:
        if fault.get("message", "") in error.message:
            continue  # said already
        say(f"  {fault.get('pointer', '')}: {fault.get('message', '')}")
    if error.status == _UNAUTHENTICATED:
        say(
            "Give the token with --token or WA_TOKEN. `wa env` prints that of a stack on this machine, which "
            "keeps it in DATA/credentials.json; for any other service, ask who runs it."
        )
    elif error.hint:
        say(f"  {error.hint}")
    elif error.code == "unexpected_answer":
        say("WA_DEBUG=1 shows where. Please report it if the versions agree.")
    is_usage = error.status in _BAD_REQUEST and error.code != _TOO_LITTLE_KEPT
    return _USAGE if is_usage else _FAILED
