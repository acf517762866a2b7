"""What was probably meant by a word that is unknown: an option, a run's id, an average's name.

Commands and recipes are suggested where they are looked up. Asking the service is a kindness on the way out: it
never delays for long, and never turns one error into another.
"""

from __future__ import annotations

import contextlib
import re
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from typer.core import TyperCommand

from services.cli.help_texts import ReadableHelp
from wa_core.errors import WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.client import ApiError, Client

_AT = re.compile(r"/v1/runs/(?P<run>[^/:]+)(?:/averages/(?P<average>[^/:]+))?")
_NUM_RUNS = 200
_MOST = 3
_LIKENESS = 0.7


class SuggestingCommand(ReadableHelp, TyperCommand):
    """A command that says which option was probably meant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  Typer does not publish its type
        """Parse, or say what is wrong, as Typer does but for the wording."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if possible := getattr(error, "possibilities", None):
                error.message += f". Did you mean {_listed(possible)}?"  # type: ignore[attr-defined]
                error.possibilities = None  # type: ignore[attr-defined]
            raise


def suggest_name(client: Client, error: ApiError) -> str | None:
    """What to say after "there is no such run" or "no such average"; None if nothing comes near."""
    asked = _AT.match(error.path or "")
    if asked is None or error.code not in {"run_not_found", "average_not_found"}:
        return None
    with contextlib.suppress(WeightAveragingError):
        if error.code == "run_not_found":
            run_ids = [run.run_id for run in islice(client.all_runs(), _NUM_RUNS)]
            return _meant(unquote(asked["run"]), run_ids, otherwise="`wa runs` lists the runs")
        run_id = unquote(asked["run"])
        names = [average.name for average in client.averages(run_id)]
        return _meant(unquote(asked["average"] or ""), names, otherwise=f"it has: {', '.join(names) or 'none'}")
    return None


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Those that `word` may be a slip or the beginning of, best first."""
    by_lower = {each.lower(): each for each in known}
    begun = [each for lower, each in by_lower.items() if lower.startswith(word.lower())]
    close = get_close_matches(word.lower(), by_lower, cutoff=_LIKENESS)
    return begun[:_MOST] or [by_lower[lower] for lower in close]


def _meant(word: str, known: list[str], *, otherwise: str) -> str:
    found = nearest(word, known)
    return f"Did you mean {_listed(found)}?" if found else otherwise


def _listed(words: Iterable[str]) -> str:
    return " or ".join(f"'{word}'" for word in words)
