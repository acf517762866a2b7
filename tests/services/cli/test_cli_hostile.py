"""No traceback, whatever is typed: every command with arguments that nobody means well."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from services.cli.main import _PANELS

if TYPE_CHECKING:
    from support.command import Wa

WORDS = ["", "-", "--bogus", "../x", "a\x1b[31mb", "\u202e", "x" * 10_000, "9" * 5_000, "\udcff", "{}", "%00", "☃"]
COMMANDS = [name for commands in _PANELS.values() for name in commands]
PLACES = [
    *(["WORD"], ["--api-url", "WORD", "runs"], ["runs", "--api-url", "WORD"], ["runs", "--token", "WORD"]),
    *(["runs", "--since", "WORD"], ["runs", "--label", "k=WORD"], ["runs", "--state", "WORD"]),
    *(["submit", "digits", "-c", "k=WORD"], ["submit", "digits", "--average", "WORD"]),
    *(["submit", "digits", "--label", "WORD=x"], ["submit", "a:B", "--package", "WORD"]),
    *(["download", "R", "-o", "out", "--average", "swa", "--at", "WORD"], ["download", "R", "-o", "WORD"]),
    *(["rebuild", "R", "--rule", "WORD"], ["verify", "R", "WORD"], ["logs", "R", "--rank", "WORD"]),
    *(["average", "WORD", "--rule", "swa", "-o", "out"], ["average", ".", "--rule", "WORD", "-o", "out"]),
    *(["up", "--port", "WORD"], ["bench", "--size", "WORD"], ["down", "--data", "WORD/x"]),
]

# One process for all: starting Python each time would take minutes. Its stderr is what a person sees.
CHILD = """
import json, sys
from services.cli.main import main
codes = [main([part.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass") for part in one])
         for one in json.load(sys.stdin)]
print(json.dumps(codes))
"""


def test_no_command_ever_shows_a_traceback(lonely_wa: Wa) -> None:
    """Each ends with a code that the help promises, and stderr has neither traceback nor "unexpected"."""
    asked = [[command, word, *more] for command in COMMANDS for word in WORDS for more in ([], ["--json"])]
    asked += [[part.replace("WORD", word) for part in place] for place in PLACES for word in WORDS]
    asked = [one for one in asked if not _starts_something(one)]

    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(asked),
        cwd=lonely_wa.folder,
        env=lonely_wa.environment | {"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=250,
        check=False,
    )

    assert "Traceback" not in done.stderr
    assert "wa: unexpected" not in done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    wrong = [(code, one) for code, one in zip(codes, asked, strict=True) if code not in {0, 1, 2, 3}]
    assert wrong == []
    assert set(codes) >= {1, 2, 3}


def _starts_something(arguments: list[str]) -> bool:
    """`down --data /x`, `gc` and the like do no harm here; a stack would be started by nothing but a good `up`."""
    return arguments[0] in {"up", "demo", "bench"} and arguments[1:] in ([], ["--json"])
