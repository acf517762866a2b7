"""Real averager processes that start in milliseconds: forked from one that has imported everything already.

Each is a process of its own, to be killed and stopped at will, with its own log. It runs what
`services.averager.__main__` runs, but for the assessor, which here answers at once: starting the real one anew
after every kill would take a second each. `python -m support.nursery` is the process that forks.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from support.descendants import is_alive
from support.patience import eventually

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[2]
READY = "averager_ready"


@dataclass(frozen=True, slots=True)
class AveragerProcess:
    """One averager."""

    pid: int
    log: Path

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is flushed."""
        os.kill(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        """SIGSTOP: it stands still, wherever it is."""
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return is_alive(self.pid)

    @property
    def peak_rss_bytes(self) -> int:
        """The most memory that it has held."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))

    def said(self, event: str) -> list[dict[str, Any]]:
        """Its log lines of one event."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
        return [line for line in found if line["event"] == event]

    def wait_until_ready(self) -> None:
        """Return once it has begun to look for runs."""
        eventually(lambda: self.said(READY), what=f"word of readiness in {self.log}")


def forker(module: str, *arguments: str, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """The process that imports and forks, which answers each line on its stdin with one on its stdout."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env={**environment, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


class Nursery:
    """Starts averagers for one bucket; a context manager whose end kills them all.

    Args:
        folder: where their logs and scratch folders go.
        environment: their settings, as `services.runtime.settings` reads them.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self._num_started = 0
        own = {"WA_LOG_FORMAT": "json", "WA_SCRATCH_DIR": str(folder / "scratch")}
        self._forker = forker("support.nursery", environment={**os.environ, **own, **environment})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._forker.communicate(timeout=60)  # closes its stdin, at which it ends, and they with it

    def start(self, *, file_size_limit: int | None = None) -> AveragerProcess:
        """Start another averager; `file_size_limit` is the size beyond which it cannot write a file, in bytes."""
        log = self.folder / f"averager-{self._num_started}.log"
        self._num_started += 1
        pid = self._ask({"do": "fork", "log": str(log), "file_size_limit": file_size_limit})
        return AveragerProcess(pid, log)

    def wait(self, averager: AveragerProcess) -> int:
        """The exit status of one that ends, negative for the signal that killed it.

        After this its id may soon be another process's: send it nothing more.
        """
        return self._ask({"do": "wait", "pid": averager.pid})

    def _ask(self, question: dict[str, Any]) -> int:
        assert self._forker.stdin is not None
        assert self._forker.stdout is not None
        self._forker.stdin.write(json.dumps(question) + "\n")
        self._forker.stdin.flush()
        return int(self._forker.stdout.readline())


def main() -> int:
    """Fork and wait, as stdin says, until it ends."""
    import torch

    from services.averager import __main__ as averager_main
    from services.runtime.settings import Settings
    from services.runtime.stores import open_store

    assert averager_main.serve is not None, "what the averagers need is imported here, once"
    torch.set_num_threads(1)
    settings = Settings()
    store = open_store(settings)
    children: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if question["do"] == "fork":
            answer = os.fork()
            if answer == 0:
                os._exit(_live(settings, store, question))
            children.add(answer)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(question["pid"], 0)[1])
            children.remove(question["pid"])
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()
    for child in children:  # not reaped yet, so the ids are theirs, dead or alive
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return 0


def _live(settings: Any, store: Any, question: dict[str, Any]) -> int:
    """An averager's life in the forked process."""
    import structlog

    from services.averager.scratch import Scratch
    from services.averager.worker import Averager
    from services.runtime.lifecycle import Stop, run_ticks
    from services.runtime.telemetry import configure_logging
    from support.simulation.averagers import InstantAssessor
    from wa_core.clock import SystemClock

    log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream, target in ((os.open(os.devnull, os.O_RDWR), 0), (log, 1), (log, 2)):
        os.dup2(stream, target)
    if limit := question["file_size_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    stop = Stop().install()
    configure_logging("averager", log_format=settings.log_format)
    memory_bytes = settings.accumulator_memory_mb << 20
    with Scratch(settings.scratch_dir, memory_bytes=memory_bytes) as scratch:
        averager = Averager(
            store,
            clock=SystemClock(),
            assessor=InstantAssessor(),
            scratch=scratch,
            should_stop=lambda: stop.is_set,
        )
        structlog.get_logger(__name__).info(READY)
        run_ticks(averager.tick, stop=stop, interval_s=settings.poll_interval_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
