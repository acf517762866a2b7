"""`wa average`, killed or interrupted: real processes, real signals."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from wa_core.tensors import serialize

if TYPE_CHECKING:
    from support.command import Wa


NUM_LINKS = 40


@pytest.fixture
def long_run(lonely_wa: Wa) -> Wa:
    """The command in a folder whose merge takes a second or more."""
    folder = lonely_wa.folder / "run"
    folder.mkdir()
    for number in range(2):
        values = np.random.default_rng(number).standard_normal(8 << 20, dtype=np.float32)
        (lonely_wa.folder / f"{number}.data").write_bytes(serialize({"w": torch.from_numpy(values)}))
    for step in range(NUM_LINKS):
        os.link(lonely_wa.folder / f"{step % 2}.data", folder / f"step_{step}.safetensors")
    return lonely_wa


LONG = ("average", "run", "-r", "ema:half_life=7", "--threads", "1")


def interrupt(wa: Wa, output: str, signal_number: int) -> tuple[int, str]:
    """Start a merge and stop it as soon as it has noted some of its work; exit code and stderr."""
    process = wa.start(*LONG, "-o", output)
    journal = wa.folder / f".{output}.part" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_a_killed_merge_goes_on_and_gives_the_same_bytes(long_run: Wa) -> None:
    """SIGKILL at any moment costs time alone: the same command finishes the work with the bits of one go."""
    code, _ = interrupt(long_run, "killed.safetensors", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (long_run.folder / "killed.safetensors").exists()

    again = long_run(*LONG, "-o", "killed.safetensors")
    once = long_run(*LONG, "-o", "once.safetensors")

    assert (again.returncode, once.returncode) == (0, 0), again.stderr + once.stderr
    assert "going on" in again.stderr
    assert (long_run.folder / "killed.safetensors").read_bytes() == (
        long_run.folder / "once.safetensors"
    ).read_bytes()
    assert not list(long_run.folder.glob(".*"))


def test_80_ctrl_c_keeps_the_work_unless_a_source_changes(long_run: Wa) -> None:
    """Ctrl-C is exit 130 and says that work is kept; work on sources that have changed since is thrown away."""
    code, errors = interrupt(long_run, "out.safetensors", signal.SIGINT)
    assert code == 130
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    os.utime(long_run.folder / "run" / "step_3.safetensors")

    again = long_run(*LONG, "-o", "out.safetensors")

    assert again.returncode == 0, again.stderr
    assert "going on" not in again.stderr
