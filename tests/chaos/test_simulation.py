"""Averagers, a trainer and its zombies in thousands of seeded schedules, each with its own faults.

``pytest tests/chaos/test_simulation.py --sim-seeds=200000`` simulates more; ``--sim-seed=N`` tells one story
step by step, the same one every time (or ``python -m support.simulation --first N --trace`` in ``tests``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.simulation.weather import Trouble

ROOT = Path(__file__).parents[2]
NUM_PROCESSES = 2


def start(*options: str) -> subprocess.Popen[str]:
    """A process that simulates."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-m", "support.simulation", *options],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, dict[str, Any]]:
    """What it printed, and its summary."""
    output, errors = process.communicate()
    *story, summary = output.splitlines() or [""]
    assert summary.startswith("{"), f"{output}\n{errors}"
    return "\n".join(story), json.loads(summary)


@pytest.mark.timeout(3600)
def test_whatever_the_schedule_every_checkpoint_counts_once(pytestconfig: pytest.Config) -> None:
    """F1-F6, F17, F18, F21, F24 in any combination: the averages are those of the surviving path, bit for bit."""
    total = pytestconfig.getoption("--sim-seeds")
    workers = [
        start("--first", str(first), "--count", str(total - first), "--every", str(NUM_PROCESSES))
        for first in range(NUM_PROCESSES)
    ]
    totals: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    for _, summary in [finish(worker) for worker in workers]:
        totals.update(summary["totals"])
        failures += summary["failures"]
    assert not failures, "\n".join(f"--sim-seed={one['seed']}: {one['failure']}" for one in failures)
    assert totals["seeds"] == total
    for wanted in (*Trouble, "fenced", "rewinds"):
        assert totals[wanted], f"no seed had any {wanted}, so this test has lost its point"


def test_a_seed_tells_the_same_story_every_time(pytestconfig: pytest.Config) -> None:
    """Two processes go through the same steps in the same order; with --sim-seed, they are printed."""
    seed = str(pytestconfig.getoption("--sim-seed") or 7)
    stories = [finish(one)[0] for one in [start("--first", seed, "--trace") for _ in range(2)]]
    if pytestconfig.getoption("--sim-seed") is not None:
        sys.stdout.write(stories[0])
        assert stories[0].endswith("all is well"), stories[0]
    assert stories[0].count("\n") > 20
    assert without_names(stories[0]) == without_names(stories[1])


def without_names(story: str) -> list[str]:
    """The steps without what is random on purpose: run ids, nonces, the averagers' own names."""
    return [" ".join(line.split()[:3]) for line in story.splitlines()]
