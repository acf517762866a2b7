"""Keeps children running: spawns them, restarts a dead one with growing waits, stops them in order.

Knows nothing of what the children are. Each child leads a session (and process group) of its own, so Ctrl-C
on the terminal reaches the supervisor alone, and whatever a child leaves behind can be found and killed.
"""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog

from services.stack.leftovers import ProcessRef, kill_all, reference, session_members

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from services.stack.processes import ChildSpec

log = structlog.get_logger(__name__)

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 10.0
STEADY_AFTER_S = 30.0
_POLL_S = 0.05


@dataclass(slots=True)
class _Child:
    spec: ChildSpec
    process: subprocess.Popen[bytes] | None = None
    reference: ProcessRef | None = None
    started_at: float = 0.0
    restart_at: float = 0.0
    failures: int = field(default=0)


class Supervisor:
    """Runs named children until told to stop. Not for several threads at once.

    Args:
        logs: folder of the children's log files, `NAME.log`, appended to.
        on_change: called with the current processes after every start and restart.
    """

    def __init__(self, *, logs: Path, on_change: Callable[[dict[str, ProcessRef]], None]) -> None:
        self._logs = logs
        self._on_change = on_change
        self._children: dict[str, _Child] = {}

    @property
    def references(self) -> dict[str, ProcessRef]:
        """The newest process of every child, by child name."""
        return {name: child.reference for name, child in self._children.items() if child.reference}

    def start(self, spec: ChildSpec) -> None:
        """Start a child and keep it running from now on.

        Raises:
            OSError: its program cannot be started at all.
        """
        child = _Child(spec)
        self._children[spec.name] = child
        self._spawn(child)

    def is_alive(self, name: str) -> bool:
        """Whether the child runs at this moment."""
        process = self._children[name].process
        return process is not None and process.poll() is None

    def failures(self, name: str) -> int:
        """How many times in a row the child has died early."""
        return self._children[name].failures

    def watch(self) -> None:
        """Look at every child once: note the dead, restart those whose wait is over."""
        now = time.monotonic()
        for name, child in self._children.items():
            if child.process is not None and not self.is_alive(name):
                self._bury(child, now=now)
            if child.process is None and now >= child.restart_at:
                self._spawn(child)

    def stop(self, order: Iterable[tuple[str, ...]], *, is_hurried: Callable[[], bool] = lambda: False) -> None:
        """End all children, group by group: SIGTERM, then SIGKILL to whatever is left of their sessions.

        Args:
            order: names that end together, in order; names that were never started are skipped.
            is_hurried: when it turns true, nobody is waited for any longer.
        """
        for names in order:
            group = [self._children[name] for name in names if name in self._children]
            for child in group:
                _signal(child, signal.SIGTERM)
            for child in group:
                _wait(child, is_hurried=is_hurried)
                self._clear_session(child)
                child.process = None

    def _spawn(self, child: _Child) -> None:
        spec = child.spec
        with (self._logs / f"{spec.name}.log").open("ab") as output:
            child.process = subprocess.Popen(
                spec.argv,
                env=dict(spec.environment),
                cwd=self._logs,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        child.started_at = time.monotonic()
        child.reference = reference(child.process.pid)
        self._on_change(self.references)

    def _bury(self, child: _Child, *, now: float) -> None:
        # What the dead child started must go first: it may hold the ports that the next one needs.
        self._clear_session(child)
        child.failures = 0 if now - child.started_at >= STEADY_AFTER_S else child.failures
        wait_s = min(FIRST_WAIT_S * 2**child.failures, LONGEST_WAIT_S)
        child.failures += 1
        child.restart_at = now + wait_s
        status = child.process.returncode if child.process else None
        child.process = None
        log.warning(
            "child_died",
            child=child.spec.name,
            status=_describe(status),
            restart_in_s=wait_s,
            log=self._log(child),
        )

    def _clear_session(self, child: _Child) -> None:
        leader = child.reference
        if leader is not None and (killed := kill_all(lambda: session_members(leader))):
            log.info("children_killed", child=child.spec.name, pids=killed)

    def _log(self, child: _Child) -> str:
        return str(self._logs / f"{child.spec.name}.log")


def _signal(child: _Child, number: signal.Signals) -> None:
    if child.process is not None and child.process.poll() is None:
        child.process.send_signal(number)


def _wait(child: _Child, *, is_hurried: Callable[[], bool]) -> None:
    """Wait until the child has ended or its grace is over; what remains is killed by the caller."""
    deadline = time.monotonic() + child.spec.grace_s
    while child.process is not None and child.process.poll() is None:
        if is_hurried() or time.monotonic() > deadline:
            log.warning("child_outstayed", child=child.spec.name)
            child.process.kill()
            child.process.wait()
            return
        time.sleep(_POLL_S)


def _describe(status: int | None) -> str:
    """What an exit status means, for a log line."""
    if status is None:
        return "unknown"
    return f"exit {status}" if status >= 0 else signal.Signals(-status).name
