"""Supervisor: children are restarted, replaced whole, and ended in order with all that they started."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import pytest

from services.stack.leftovers import ProcessRef, kill_all, members, reference, session_members
from services.stack.processes import ChildSpec
from services.stack.supervisor import Supervisor
from support.patience import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SLEEP = "import time; time.sleep(600)"


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stand]:
    """A supervisor of stand-in children; whatever a test leaves is killed."""
    stand = Stand(tmp_path)
    yield stand
    stand.supervisor.stop([tuple(stand.supervisor.references)], is_hurried=lambda: True)
    kill_all(lambda: members(stand.stack_id, []))


class Stand:
    """A supervisor, its marker and what it reported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack_id = f"test-{os.getpid()}-{folder.name}"
        self.reports: list[dict[str, ProcessRef]] = []
        self.supervisor = Supervisor(logs=folder, on_change=self.reports.append)

    def start(self, name: str, code: str, *, grace_s: float = 10.0) -> int:
        """Start a child that runs `code`, and return its process id."""
        environment = {**os.environ, "WA_STACK_ID": self.stack_id}
        spec = ChildSpec(name, (sys.executable, "-c", code), environment, grace_s=grace_s)
        self.supervisor.start(spec)
        return self.pid(name)

    def pid(self, name: str) -> int:
        """The child's newest process id."""
        return self.supervisor.references[name].pid

    def log(self, name: str) -> str:
        """What the child wrote."""
        return (self.folder / f"{name}.log").read_text()

    def left(self) -> list[int]:
        """Living processes that carry the marker."""
        return members(self.stack_id, [])


def test_a_killed_child_is_restarted_and_reported(stack: Stand) -> None:
    """A child that is killed comes back by itself under a new process id, which is reported."""
    first = stack.start("api", SLEEP)

    os.kill(first, signal.SIGKILL)
    eventually(lambda: (stack.supervisor.watch(), stack.pid("api") != first)[1], what="its restart")

    assert stack.supervisor.is_alive("api")
    assert stack.reports[-1]["api"].pid == stack.pid("api")
    assert stack.supervisor.failures("api") == 1


def test_what_a_dead_child_started_goes_before_it_is_restarted(stack: Stand) -> None:
    """Grandchildren of a killed child are killed too, so they hold no port that the next one needs."""
    first = stack.start(
        "ray", f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]).wait()"
    )
    eventually(lambda: len(stack.left()) == 2, what="the grandchild")
    grandchild = next(pid for pid in stack.left() if pid != first)

    os.kill(first, signal.SIGKILL)
    eventually(lambda: (stack.supervisor.watch(), stack.pid("ray") != first)[1], what="its restart")

    assert grandchild not in stack.left()


def test_restarts_wait_longer_each_time(stack: Stand) -> None:
    """A child that cannot live is not restarted in a busy loop: the waits double."""
    stack.start("runner", "raise SystemExit(3)")
    starts = [time.monotonic()]

    while len(starts) < 3:
        before = stack.pid("runner")
        eventually(lambda: (stack.supervisor.watch(), stack.pid("runner") != before)[1], what="its restart")  # noqa: B023  used at once
        starts.append(time.monotonic())

    assert starts[1] - starts[0] >= 0.5
    assert starts[2] - starts[1] >= 1.0


def test_children_end_in_the_order_given(stack: Stand) -> None:
    """Shutdown is ordered: a later group is told to end only when the earlier one has ended."""
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n    time.sleep(0.3); print(time.monotonic()); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); print('up', flush=True); time.sleep(600)"
    )
    for name in ("store", "runner"):
        stack.start(name, code)
        eventually(lambda: "up" in stack.log(name), what="its start")  # noqa: B023  used at once

    stack.supervisor.stop([("runner",), ("store",)])

    ended = {name: float(stack.log(name).split()[-1]) for name in ("store", "runner")}
    assert ended["store"] >= ended["runner"] + 0.3
    assert stack.left() == []


def test_a_child_that_ignores_sigterm_is_killed_with_its_children(stack: Stand) -> None:
    """SIGTERM is followed by SIGKILL after the grace, for the child and for all that it started."""
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {SLEEP!r}])\n"
        "print('up', flush=True); time.sleep(600)"
    )
    stack.start("averager", code, grace_s=0.3)
    eventually(lambda: "up" in stack.log("averager") and len(stack.left()) == 2, what="both starts")

    stack.supervisor.stop([("averager",)])

    assert stack.left() == []


def test_a_hurried_stop_waits_for_nobody(stack: Stand) -> None:
    """A second Ctrl-C ends everything at once, and still leaves nothing."""
    stack.start(
        "averager",
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
    )
    eventually(lambda: "up" in stack.log("averager"), what="its start")
    began = time.monotonic()

    stack.supervisor.stop([("averager",)], is_hurried=lambda: True)

    assert time.monotonic() - began < 5.0
    assert stack.left() == []


def test_a_process_that_hid_its_environment_is_found_by_its_session(stack: Stand) -> None:
    """Ray's agents overwrite their environment; the session of their leader still gives them away."""
    leader = stack.start("ray", SLEEP)
    ref = stack.supervisor.references["ray"]

    assert session_members(ref) == [leader]
    assert members("no-such-marker", [ref]) == [leader]


def test_a_stranger_who_got_a_recycled_process_id_is_left_alone(stack: Stand) -> None:
    """A process id without its start time proves nothing: another start time means another process."""
    leader = stack.start("ray", SLEEP)

    assert members("no-such-marker", [ProcessRef(pid=leader, started="1")]) == []


def test_a_process_that_began_a_session_of_its_own_is_found_by_its_marker(stack: Stand) -> None:
    """A daemon cannot escape the stack: it carries the marker."""
    escaping = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}], start_new_session=True)"
    )
    stack.start("runner", escaping)
    eventually(lambda: not stack.supervisor.is_alive("runner") and len(stack.left()) == 1, what="its end")

    killed = kill_all(stack.left)

    assert len(killed) == 1
    assert stack.left() == []


def test_this_process_is_known_by_its_start_time() -> None:
    """A reference names one process for ever: looking twice gives the same one."""
    assert reference(os.getpid()) == reference(os.getpid())
    assert reference(os.getpid()).started
