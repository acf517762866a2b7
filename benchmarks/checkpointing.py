"""What checkpoints add to the time of training, background work counted in, beside the usual ways to take them.

`python -m benchmarks.checkpointing` trains 50M float32 parameters on the CPU and stores checkpoints in a real
SeaweedFS on this machine. Each method runs in a process of its own (`benchmarks.checkpointing_job`): stretches of
steps with one checkpoint at their beginning, in turn with as many steps without. The upload happens while training
goes on, so what it takes from the steps is in the figure. The server stands for another machine, so it runs at the
lowest priority, for every method: it gets what training and the method leave. With `--method` one method is
measured, and its figures are put beside those that are there. Writes `benchmarks/results/checkpointing.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import processes, results
from benchmarks.store_fold import running_store

NAMES = {
    "publisher": "CheckpointPublisher",
    "blocking": "torch.save + boto3, blocking",
    "thread": "copy, then torch.save + boto3 in a thread",
    "dcp": "DCP async_save, boto3 in a thread",
    "dcp-process": "DCP async_save in a process, boto3 in a thread",
}
OURS = "publisher"
COPIES_ALLOWED, TIMES_BLOCKING = 2.0, 20.0


def measure(method: str, *, steps: int, rounds: int, threads: int) -> dict[str, Any]:
    """Seconds of every stretch of one method."""
    with tempfile.TemporaryDirectory(prefix="wa-bench-") as name, running_store(Path(name), niceness=19) as config:
        argv = [sys.executable, "-m", "benchmarks.checkpointing_job", method, config.endpoint_url]
        argv += [config.access_key, config.secret_key, config.bucket, str(steps), str(rounds), str(threads)]
        return dict(json.loads(processes.run(argv).output))


def added_s(found: dict[str, Any]) -> float:
    """Seconds that a checkpoint adds: the median over pairs of neighbouring stretches."""
    return median(a - b for a, b in zip(found["with"], found["without"], strict=True))


def markdown(data: dict[str, Any]) -> str:
    """The table that people read."""
    methods = data["methods"]
    copy_s = median(found["copy_s"] for found in methods.values())
    ours = added_s(methods[OURS]) if OURS in methods else None
    rows = [
        [
            NAMES[name],
            f"{1e3 * added_s(found):.0f} ms",
            f"{1e3 * median(found['call']):.0f} ms",
            f"{added_s(found) / copy_s:.1f}",
            f"{added_s(found) / ours:.1f}" if ours else "",
        ]
        for name in NAMES
        if (found := methods.get(name))
    ]
    first = next(iter(methods.values()))
    header = ["", "added to training", "of that, the call", "copies of the weights", "times ours"]
    return (
        f"{first['num_parameters'] / 1e6:.1f}M float32 parameters, SGD on {data['threads']} thread(s), a "
        f"checkpoint every {data['steps']} steps ({median(first['without']):.1f} s), stored in SeaweedFS here, "
        f"which runs at the lowest priority as it stands for another machine. Medians of {data['rounds']} pairs "
        f"of stretches with and without a checkpoint; one copy of the weights takes {1e3 * copy_s:.0f} ms.\n\n"
        f"{results.table(header, rows)}"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", choices=NAMES, help="measure this one alone, and keep the others' figures")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of training; the service's trainer takes one")
    options = parser.parse_args()
    settings = {"steps": options.steps, "rounds": options.rounds, "threads": options.threads}
    path = results.RESULTS / "checkpointing.json"
    known = json.loads(path.read_text()) if options.method and path.exists() else {}
    methods = known.get("methods", {}) if {name: known.get(name) for name in settings} == settings else {}
    for method in [options.method] if options.method else NAMES:
        methods[method] = measure(method, **settings)
        print(f"{NAMES[method]}: {1e3 * added_s(methods[method]):.0f} ms", file=sys.stderr)
    data = settings | {"methods": methods}
    results.write("checkpointing", data=data, text=markdown(data))


if __name__ == "__main__":
    main()
