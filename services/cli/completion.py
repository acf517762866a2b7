"""What a shell offers after TAB: the runs there are, the averages of the run that was typed.

A shell waits for it, so it asks once, briefly, and offers nothing when nobody answers.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from itertools import islice
from typing import TYPE_CHECKING, Any

from wa_core.errors import WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.client import Client

_NUM_RUNS = 50
_PATIENCE_S = 2.0


def completed_command(environ: Mapping[str, str] = os.environ) -> str | None:
    """The command whose words a shell wants completed, if this process was asked to; only that one is loaded."""
    words = _typed_words(environ)
    return words[1] if "_WA_COMPLETE" in environ and len(words) > 1 else None


def complete_run(ctx: Any, incomplete: str) -> list[tuple[str, str]]:  # noqa: ANN401  Typer does not publish its type
    """The newest runs whose id begins so, each with its state and recipe."""
    found: list[tuple[str, str]] = []
    with contextlib.suppress(WeightAveragingError), _client(ctx) as client:
        runs = islice(client.all_runs(page_size=_NUM_RUNS), _NUM_RUNS)
        found = [(run.run_id, f"{run.state}, {run.recipe or 'no recipe'}, step {run.step}") for run in runs]
    return [(run_id, about) for run_id, about in found if run_id.startswith(incomplete.upper())]


def complete_average(ctx: Any, incomplete: str) -> list[tuple[str, str]]:  # noqa: ANN401  as above
    """The averages of the run that was typed before, each with its rule."""
    # Not at the top: every command imports this module, and what ids are made of takes long to load.
    from wa_core.layout import is_run_id

    # While an option has no value yet Typer has no parameters; the words that were typed have the run.
    run_id = ctx.params.get("run_id") or next(filter(is_run_id, _typed_words(os.environ)), None)
    found: list[tuple[str, str]] = []
    with contextlib.suppress(WeightAveragingError), _client(ctx) as client:
        if run_id:
            found = [(each.name, each.rule) for each in client.averages(run_id)]
    return [(name, rule) for name, rule in found if name.startswith(incomplete)]


def _typed_words(environ: Mapping[str, str]) -> list[str]:
    typed = environ.get("COMP_WORDS") or environ.get("_TYPER_COMPLETE_ARGS") or ""
    try:
        return shlex.split(typed)
    except ValueError:  # an open quote
        return typed.split()


def _client(ctx: Any) -> Client:  # noqa: ANN401  as above
    from services.cli.connection import service_of
    from services.client import Client

    api_url = ctx.params.get("api_url") or os.environ.get("WA_API_URL")
    api_url, token = service_of(api_url, ctx.params.get("token") or os.environ.get("WA_TOKEN"))
    return Client(api_url, token=token, timeout_s=_PATIENCE_S, patience_s=0.0)
