"""An averager's hard times, in figures: folds a minute undisturbed and under faults, and a soak of three.

`python -m benchmarks.averager_soak` starts real averagers (`python -m services.averager`) on a real SeaweedFS and
trains runs of tiny models by hand: first a backlog that one undisturbed averager folds; then the same with that
averager killed or stopped and the store killed every few seconds; then 300 checkpoints with three averagers,
stopped for up to 30 s. Each time every checkpoint must have been counted once, and the averages be exact to the
last bit. Writes `benchmarks/results/averager_soak.{json,md}`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import results, testbed
from support.seaweed import running_seaweed
from support.soak import Hardship, soak

assert testbed.TESTS.is_dir()

PEACE = Hardship(num_averagers=1, strike_every_s=0, kill_store_every_s=0)
FAULTS = Hardship(num_averagers=1, strike_every_s=8.0, stop_s=(0.5, 3.0), kill_store_every_s=8.0)
SOAK = Hardship()
KINDS = {
    "one averager, undisturbed": PEACE,
    "one averager under faults": FAULTS,
    "soak of three averagers": SOAK,
}


def measure(num_checkpoints: int) -> dict[str, Any]:
    """Folds a minute of every kind, and what was done to it."""
    steps = range(10, 10 * num_checkpoints + 10, 10)
    found = {}
    for kind, hardship in KINDS.items():
        with (
            tempfile.TemporaryDirectory(prefix="wa-bench-") as name,
            running_seaweed(Path(name) / "store") as seaweed,
        ):
            done = soak(seaweed, Path(name), steps=steps, hardship=hardship, is_backlog=hardship is not SOAK)
            done.run.check(steps)
        per_minute = 60 * num_checkpoints / done.took_s
        happened = dict(Counter(done.happened))
        print(f"{kind}: {per_minute:.0f} checkpoints a minute; {happened}", file=sys.stderr)
        found[kind] = {
            "per_minute": per_minute,
            "took_s": done.took_s,
            "happened": happened,
            "hardship": asdict(hardship),
        }
    return {"num_checkpoints": num_checkpoints, "kinds": found}


def markdown(data: dict[str, Any]) -> str:
    """The table that people read."""
    rows = [
        [
            kind,
            f"{one['per_minute']:.0f}",
            f"{one['took_s']:.0f} s",
            ", ".join(f"{what} {number} times" for what, number in one["happened"].items()) or "nothing",
        ]
        for kind, one in data["kinds"].items()
    ]
    return (
        f"{data['num_checkpoints']} checkpoints of a tiny model with two averages, on a real SeaweedFS; every "
        "checkpoint was counted once, and the averages were exact to the last bit. The first two folded a "
        "backlog; in the soak they came as fast as one trainer could commit them.\n\n"
        f"{results.table(['', 'checkpoints a minute', 'time', 'what was done to it'], rows)}"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoints", type=int, default=300)
    options = parser.parse_args()
    data = measure(options.checkpoints)
    results.write("averager_soak", data=data, text=markdown(data))


if __name__ == "__main__":
    main()
