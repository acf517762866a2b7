"""`python -m benchmarks.start_up`: from POST /runs to the first training step, beside bare Ray Train's own start.

Both run on one local Ray head with the same `ScalingConfig`, in turn, and do the first step of one recipe under
DDP. Bare Ray is a plain script: its time begins when the script is started, and its train function writes
down when its first step is done. Ours begins with the request; the first step's time is its own metric line's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import testbed
from benchmarks.results import RESULTS, table, write
from support.stack import RunningStack, down, submission, up

assert testbed is not None
BARE = Path(__file__).parent / "peer_scripts" / "bare_ray_train.py"
TARGET = 1.25
CONFIG = {"epochs": 1, "lr": 0.1}


def main() -> None:
    """Measure in turn, and print the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--more", action="store_true", help="put these rounds beside those that are there")
    options = parser.parse_args()
    found: dict[str, list[float]] = {"ours": [], "bare": []}
    if options.more:
        found = json.loads((RESULTS / "start_up.json").read_text())["seconds"]
    data = Path(tempfile.mkdtemp(prefix="wa-start-"))
    try:
        stack = up(data)
        for turn in range(options.rounds + 1):  # the first one warms the disk's cache, and does not count
            for kind, measure in (("ours", measure_ours), ("bare", measure_bare)):
                seconds = measure(stack)
                print(f"{kind}: {seconds:.2f} s" + ("" if turn else "  (not counted)"), file=sys.stderr)
                if turn:
                    found[kind].append(seconds)
    finally:
        down(data)
    medians = {kind: median(times) for kind, times in found.items()}
    ratio = medians["ours"] / medians["bare"]
    rows = [(kind, f"{medians[kind]:.2f}", " ".join(f"{time:.2f}" for time in found[kind])) for kind in found]
    text = f"From POST /runs to the first step: {ratio:.2f} times bare Ray Train's start (at most {TARGET})\n\n"
    text += table(["", "median s", "each"], rows)
    write("start_up", data={"seconds": found, "median_s": medians, "ratio": ratio, "target": TARGET}, text=text)


def measure_ours(stack: RunningStack) -> float:
    """Seconds from the request to the end of the first step; returns once the run is over."""
    began_at = datetime.now(UTC)
    with stack.client() as client:
        run_id = client.submit(submission(config=CONFIG, averages=[]))["run_id"]
        client.wait(run_id, poll_s=2.0)  # who asks all the time takes the processors that it wants to start on
        first: dict[str, Any] = client.metrics(run_id, limit=1)["data"][0]
        assert first["step"] == 1
    return (datetime.fromisoformat(first["at"]) - began_at).total_seconds()


def measure_bare(stack: RunningStack) -> float:
    """Seconds from the start of a plain Ray Train script to the end of its first step."""
    environ = Path(f"/proc/{stack.pids()['runner']}/environ").read_text().split("\0")
    told = dict(entry.split("=", 1) for entry in environ if entry.startswith(("RAY_", "WA_RAY_", "AUTOSCALER_")))
    with tempfile.TemporaryDirectory() as folder:
        stamp = Path(folder) / "first-step"
        began_at = time.time()
        subprocess.run(
            [sys.executable, str(BARE), told["WA_RAY_ADDRESS"], str(stamp), json.dumps(CONFIG)],
            env={**os.environ, **told},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=150,
        )
        return float(stamp.read_text()) - began_at


if __name__ == "__main__":
    main()
