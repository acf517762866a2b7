"""`wa` commands that start in milliseconds: forked from one that has imported everything already.

Each is a process of its own, with its own folder, environment and output. What a command imports, and how it deals
with signals, is for tests that start `python -m services.cli` itself. `python -m support.command_nursery` is the
process that forks; it answers each line on its stdin with an exit status.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from support.nursery import ROOT, forker

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_COMMAND = str(ROOT / "services" / "cli" / "__main__.py")


class CommandNursery:
    """Runs commands, one at a time; a context manager."""

    def __enter__(self) -> Self:
        self._forker = forker("support.command_nursery", environment=_without_ours(os.environ))
        return self

    def __exit__(self, *_: object) -> None:
        self._forker.communicate(timeout=60)

    @staticmethod
    def can_run(environment: Mapping[str, str]) -> bool:
        """Whether a command under these variables is like any other; some are looked at by what is imported."""
        return _without_ours(environment) == _without_ours(os.environ)

    def run(
        self, arguments: Sequence[str], *, folder: Path, environment: Mapping[str, str], stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        assert self._forker.stdin is not None
        assert self._forker.stdout is not None
        with tempfile.TemporaryDirectory() as kept:
            outputs = [Path(kept, name) for name in ("stdout", "stderr")]
            (given := Path(kept, "stdin")).write_text(stdin)
            wish = {
                "argv": [_COMMAND, *arguments],
                "folder": str(folder),
                "environment": dict(environment),
                "stdin": str(given),
                "outputs": [str(path) for path in outputs],
            }
            self._forker.stdin.write(json.dumps(wish) + "\n")
            self._forker.stdin.flush()
            code = int(self._forker.stdout.readline())
            stdout, stderr = (path.read_text() for path in outputs)
        return subprocess.CompletedProcess(list(arguments), code, stdout, stderr)


def _without_ours(environment: Mapping[str, str]) -> dict[str, str]:
    """Without `PYTEST_CURRENT_TEST`, which is another at every moment, and what commands look at when they run."""
    return {name: value for name, value in environment.items() if not name.startswith(("WA_", "PYTEST_"))}


def main() -> None:
    """Fork for every line, and be the command in the child."""
    _import_everything()
    gc.freeze()  # or each child would look through all of it, and so copy it
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
            os._exit(_run_to_the_end())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


def _import_everything() -> None:
    import services.cli
    from services.client import Client

    assert importlib.import_module("torch"), "what averaging needs"
    Client("http://127.0.0.1:9").close()
    for found in pkgutil.iter_modules(services.cli.__path__, "services.cli."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)


def _become(wish: dict[str, Any]) -> None:
    for target, path in enumerate([wish["stdin"], *wish["outputs"]]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), target)
    os.chdir(wish["folder"])
    os.environ.clear()
    os.environ.update(wish["environment"])
    sys.argv = wish["argv"]


def _run_to_the_end() -> int:
    """What Python does with a program, but for taking apart what it has imported, which takes longest."""
    from services.cli.main import run

    status = 1
    try:
        run()
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:  # noqa: BLE001  as the interpreter does
        traceback.print_exc()
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return status


if __name__ == "__main__":
    main()
