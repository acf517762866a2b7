"""An exponential average in memory, beside its peers: time per update, and error against float64.

`python -m benchmarks.ema_peers` runs `AveragedModel`, ema-pytorch, timm's ModelEmaV3 and `ShadowWeights`, each in
a process of its own environment, in turn, on the same weights. Writes `benchmarks/results/ema_peers.{json,md}`.
`ShadowWeights` also refuses NaN and infinity at each update, which the others do not, nor does it where it says
`unchecked`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import processes, results
from benchmarks.peers import SCRIPTS, python_of

# width, layers, updates that are timed
SIZES = {"25M": (720, 48, 15), "350M": (2_048, 83, 5)}
DTYPES = ("float32", "bfloat16")
# A small model is enough for the error, after as many updates as a real run has.
ERROR = (64, 4, 1_000)
PEERS = {
    "AveragedModel": "torch",
    "ema-pytorch": "ema-pytorch",
    "timm ModelEmaV3": "timm",
    "ShadowWeights": None,
    "ShadowWeights, unchecked": None,
    "ShadowWeights, float64": None,
}


def run(kind: str, mode: str, shape: tuple[int, int, int], dtype: str) -> tuple[Any, int]:
    """One process: what it printed, and its peak memory in bytes."""
    peer = PEERS[kind]
    python = sys.executable if peer is None else python_of(peer)
    width, layers, updates = map(str, shape)
    # Only ours may find the project.
    env = {"PYTHONPATH": str(Path.cwd()) if peer is None else os.devnull}
    usage = processes.run(
        [python, str(SCRIPTS / "ema_update.py"), kind, mode, width, layers, dtype, updates], env=env
    )
    return json.loads(usage.output), usage.peak_rss_bytes


def measure(sizes: list[str], dtypes: list[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each size, dtype and kind."""
    rows = []
    for dtype in dtypes:
        errors = {kind: run(kind, "error", ERROR, dtype)[0] for kind in PEERS}
        for size in sizes:
            found: dict[str, list[float]] = {kind: [] for kind in PEERS}
            memory = dict.fromkeys(PEERS, 0)
            for _ in range(rounds):
                for kind in PEERS:
                    seconds, peak = run(kind, "time", SIZES[size], dtype)
                    found[kind] += seconds
                    memory[kind] = max(memory[kind], peak)
            rows += [
                {"size": size, "dtype": dtype, "kind": kind, "error": errors[kind], "peak_rss_bytes": memory[kind]}
                | {"median_s": median(found[kind]), "seconds": found[kind]}
                for kind in PEERS
            ]
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table that people read."""
    peer = {(row["size"], row["dtype"]): row["median_s"] for row in rows if row["kind"] == "AveragedModel"}
    lines = [
        [
            row["size"],
            row["dtype"],
            row["kind"],
            f"{row['median_s'] * 1e3:.1f} ms",
            f"{row['median_s'] / peer[row['size'], row['dtype']]:.2f}",
            f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
            f"{row['error']['max']:.1e}",
            f"{row['error']['rms']:.1e}",
        ]
        for row in rows
    ]
    title = (
        f"Exponential average with decay 0.999 in memory; each kind in its own process and environment, in turn. "
        f"The ratio is to AveragedModel. Errors after {ERROR[2]:,} updates, against float64, in units of the "
        f"average's root mean square."
    )
    header = ["size", "dtype", "", "median update", "ratio", "peak RSS", "largest error", "rms error"]
    return f"{title}\n\n{results.table(header, lines)}"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    rows = measure(options.sizes, options.dtypes, options.rounds)
    results.write("ema_peers", data={"rows": rows}, text=markdown(rows))


if __name__ == "__main__":
    main()
