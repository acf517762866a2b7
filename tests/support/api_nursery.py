"""API processes that start in milliseconds: forked from one that has imported everything already.

Each is a process of its own, to be killed at any moment. `python -m support.api_nursery FOLDER PORT` is the
process that forks; every line on its stdin is a wish: ``start`` or ``kill``. It answers each with a line.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from support.nursery import forker


@dataclass
class ApiNursery:
    """One API at a time on one port, over a bucket that is a folder; a context manager."""

    bucket: Path
    port: int

    def __enter__(self) -> Self:
        self._forker = forker("support.api_nursery", str(self.bucket), str(self.port), environment=os.environ)
        return self

    def __exit__(self, *_: object) -> None:
        self._forker.communicate(timeout=60)

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the API; it may take a moment until it listens."""
        self._ask("start")

    def kill(self) -> None:
        """SIGKILL the API, and wait for its end."""
        self._ask("kill")

    def _ask(self, wish: str) -> None:
        assert self._forker.stdin is not None
        assert self._forker.stdout is not None
        self._forker.stdin.write(f"{wish}\n")
        self._forker.stdin.flush()
        assert self._forker.stdout.readline() == f"{wish}\n"


def main() -> int:
    """Fork and kill, as stdin says, until it ends."""
    import uvicorn

    from services.api.app import create_app
    from wa_core.store.local import LocalStore

    folder, port = sys.argv[1], int(sys.argv[2])
    child = 0
    for line in sys.stdin:
        if line.strip() == "start":
            child = os.fork()
            if child == 0:
                for stream in (0, 1, 2):
                    os.dup2(os.open(os.devnull, os.O_RDWR), stream)
                app = create_app(store=LocalStore(Path(folder)))
                uvicorn.run(app, host="127.0.0.1", port=port, log_config=None, access_log=False)
                os._exit(0)
        else:
            child = _end(child)
        sys.stdout.write(line)
        sys.stdout.flush()
    _end(child)
    return 0


def _end(child: int) -> int:
    if child:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
