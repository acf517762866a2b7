"""``python -m support.simulation``: simulate seeds, one after the other, and say which broke something.

With ``--trace`` every step is printed. The same seed always gives the same story, in any process.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import stamina
import structlog
import torch

from support.simulation.world import Story, World

TRIES = 3  # of one store operation, without waits, before its caller's patience ends
STUCK_S = 120  # of real time: longer than any story


def main() -> int:
    """Simulate; the last line of output is a summary as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="simulate each n-th seed only")
    parser.add_argument("--stop-after", type=int, default=5, help="failures")
    parser.add_argument("--trace", action="store_true")
    options = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets is part of a story
        again = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, again, os.environ | {"PYTHONHASHSEED": "0"})  # noqa: S606  ourselves
    torch.set_num_threads(1)
    stamina.set_testing(True, attempts=TRIES)
    gc.freeze()  # what is imported stays: looking through it again and again costs a fifth of the time
    with tempfile.TemporaryDirectory(prefix="wa-simulation-") as scratch:
        summary = simulate_all(options, scratch=Path(scratch))
    sys.stdout.write(json.dumps(summary) + "\n")
    return bool(summary["failures"])


def simulate_all(options: argparse.Namespace, *, scratch: Path) -> dict[str, Any]:
    """Every seed that was asked for, up to so many failures; returns what happened in all of them."""
    began = time.process_time()
    totals: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    for seed in range(options.first, options.first + options.count, options.every):
        faulthandler.dump_traceback_later(STUCK_S, exit=True)
        story = simulate(seed, scratch=scratch)
        totals.update(seeds=1, steps=len(story.trace), fenced=story.num_fenced, rewinds=story.num_rewinds)
        totals.update({str(trouble): number for trouble, number in story.troubles.items()})
        if options.trace:
            sys.stdout.write(narrate(story))
        if story.failure:
            failures.append({"seed": seed, "failure": story.failure})
            if len(failures) >= options.stop_after:
                break
    return {"cpu_s": time.process_time() - began, "totals": totals, "failures": failures}


def simulate(seed: int, *, scratch: Path) -> Story:
    """One seed's story; averagers work in `scratch`."""
    world = World(seed, scratch=scratch)

    def note(_logger: object, method: str, event: dict[str, Any]) -> str:
        name = str(event.pop("event"))
        if event.pop("exc_info", None):
            event["error"] = repr(sys.exc_info()[1])
        world.happened(name, str(event), is_error=method == "error")
        raise structlog.DropEvent

    structlog.configure(processors=[note], cache_logger_on_first_use=False)
    return world.run(seed)


def narrate(story: Story) -> str:
    """The story for people."""
    lines = [f"{step:5} {who:12} {what:7} {key} {trouble}" for step, who, what, key, trouble in story.trace]
    return "\n".join([*lines, f"seed {story.seed}: {story.failure or 'all is well'}", ""])


if __name__ == "__main__":
    sys.exit(main())
