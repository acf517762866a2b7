"""The embedded stack for real: SeaweedFS, Ray and our processes come up, survive kills, and leave nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from services.stack.leftovers import members
from services.stack.state import DataFolder, StackState
from support.patience import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

PARTS = {"store", "ray", "runner", "averager", "predictor", "api", "supervisor"}


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    """A data folder; whatever still runs on it at the end is stopped."""
    folder = tmp_path / "data"
    yield folder
    wa("down", "--data", str(folder))


def wa(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "services.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def start_in_foreground(data: Path) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """Start `wa up --json`; returns it and what it printed when ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "up", "--data", str(data), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout as output:
        return process, json.loads(output.readline())


def state_of(data: Path) -> StackState:
    """The running stack's state."""
    state = DataFolder(data).read_state()
    assert state is not None
    return state


def processes_of(state: StackState) -> list[int]:
    """Every living process of the stack, by its marker and by its sessions."""
    return members(state.stack_id, state.processes.values())


def is_ready(api_url: str) -> bool:
    """Whether the API says that it and its store are ready."""
    try:
        return httpx2.get(f"{api_url}/readyz", timeout=10.0).status_code == 200
    except httpx2.TransportError:
        return False


def test_a_detached_stack_repairs_itself_and_goes_without_a_trace(data: Path) -> None:
    """`wa up --detach --json` is ready when it returns; killed parts come back; `wa down` leaves no process."""
    up = wa("up", "--detach", "--json", "--data", str(data))
    assert up.returncode == 0, up.stderr
    said = json.loads(up.stdout)
    assert set(said["pids"]) == PARTS
    assert is_ready(said["api_url"])

    told = wa("env", "--data", str(data)).stdout
    assert f"export WA_API_URL={said['api_url']}\nexport WA_TOKEN={said['token']}\n" in told
    assert json.loads(wa("env", "--json", "--data", str(data)).stdout) == said

    again = wa("up", "--detach", "--data", str(data))
    assert again.returncode == 1
    assert "already runs" in again.stderr

    for part in ("store", "ray", "averager", "predictor", "runner", "api"):
        os.kill(said["pids"][part], signal.SIGKILL)
    eventually(
        lambda: all(state_of(data).pids[part] != said["pids"][part] for part in PARTS - {"supervisor"}),
        what="the restart",
    )
    eventually(lambda: is_ready(said["api_url"]), what="recovery")

    state = state_of(data)
    down = wa("down", "--data", str(data), "--json")
    assert down.returncode == 0, down.stderr
    assert set(json.loads(down.stdout)["stopped"]) == PARTS
    assert processes_of(state) == []
    assert not os.path.exists(state.scratch_dir)  # noqa: PTH110  a text in the state
    assert wa("down", "--data", str(data)).stdout.startswith("nothing runs")


def test_what_a_killed_supervisor_left_is_cleaned_up_by_the_next_start(data: Path) -> None:
    """After SIGKILL of the supervisor, the next `wa up` ends the orphans and keeps the credentials."""
    first, said = start_in_foreground(data)
    state = state_of(data)
    first.kill()
    first.wait()
    orphans = processes_of(state)
    assert len(orphans) >= len(PARTS) - 1

    second, said_again = start_in_foreground(data)
    try:
        assert not set(orphans) & set(processes_of(state))
        assert said_again["token"] == said["token"]
        assert is_ready(said_again["api_url"])
        state = state_of(data)
        second.send_signal(signal.SIGINT)
        assert second.wait(timeout=60) == 0
    finally:
        second.kill()
        second.wait()
    assert processes_of(state) == []
    assert DataFolder(data).read_state() is None


def test_an_end_during_the_start_leaves_nothing(data: Path) -> None:
    """SIGTERM before the stack is ready is obeyed at once, and what had been started goes too."""
    process = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "up", "--data", str(data)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        eventually(
            lambda: "ray" in getattr(DataFolder(data).read_state(), "processes", {}), what="the start of Ray"
        )
        state = state_of(data)
        process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()

    assert process.returncode == 0, said
    assert "before the stack was ready" in said
    assert processes_of(state) == []
