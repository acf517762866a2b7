"""What checkpoints add to the time of training, background work counted in, beside the usual ways to take them.

`python -m benchmarks.checkpointing` trains 50M float32 parameters on the CPU and stores checkpoints in a server
that stands for one on another machine: it reads and forgets what is large (`benchmarks.forgetful`). Each method
runs in a process of its own (`benchmarks.checkpointing_job`): stretches of steps with one checkpoint at their
beginning, in turn with as many steps without. The upload happens while training goes on, so what it takes from the
steps is in the figure, which is the sum of three parts:

- the call itself;
- waiting: the time of steps in which the training thread did not run, for want of a processor or a lock;
- slower steps: what they ran longer, as memory and caches are shared. A machine that shares its hardware with
  others changes its speed for seconds by far more, so this is the sum over the stretch's steps, first to last, of
  the difference between medians.

With `--method` one method is measured, and its figures are put beside those that are there. Writes
`benchmarks/results/checkpointing.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks import processes, results
from benchmarks.store_fold import running_store, wait_until_listening
from services.stack import seaweedfs

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = {
    "none": "nothing (what the measurement itself is off by)",
    "copy": "one copy in memory, and no upload",
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
    with (
        tempfile.TemporaryDirectory(prefix="wa-bench-") as name,
        running_store(Path(name), niceness=19) as config,
        forgetful(config.ports[0]) as endpoint_url,
    ):
        argv = [sys.executable, "-m", "benchmarks.checkpointing_job", method, endpoint_url]
        argv += [config.access_key, config.secret_key, config.bucket, str(steps), str(rounds), str(threads)]
        return dict(json.loads(processes.run(argv).output))


@contextmanager
def forgetful(target_port: int) -> Iterator[str]:
    """The URL of a server that forgets what is large, and passes the rest on."""
    (port,) = seaweedfs.free_ports(1)
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.forgetful", str(port), str(target_port)])
    try:
        wait_until_listening(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def parts_s(found: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds that a checkpoint adds to training: in the call, by waiting, and by slower steps."""
    away, ran = {}, {}
    for kind in ("with", "without"):
        away[kind] = [sum(took - ran for took, ran in stretch) for stretch in found[kind]]
        # Step by step, as the upload is under way during the first ones only.
        ran[kind] = sum(median(ran for _, ran in steps) for steps in zip(*found[kind], strict=True))
    waited = median(a - b for a, b in zip(away["with"], away["without"], strict=True))
    return median(found["call"]), waited, ran["with"] - ran["without"]


def added_s(found: dict[str, Any]) -> float:
    """Seconds that a checkpoint adds to training."""
    return sum(parts_s(found))


def markdown(data: dict[str, Any]) -> str:
    """The table that people read."""
    methods = data["methods"]
    copy_s = median(found["copy_s"] for found in methods.values())
    ours = added_s(methods[OURS]) if OURS in methods else None
    rows = [
        [
            NAMES[name],
            *(f"{1e3 * value:.0f} ms" for value in (added_s(found), *parts_s(found))),
            f"{added_s(found) / copy_s:.1f}",
            f"{added_s(found) / ours:.1f}" if ours else "",
            len(found["call"]),
        ]
        for name in NAMES
        if (found := methods.get(name))
    ]
    first = next(iter(methods.values()))
    step_s = median(took for stretch in first["without"] for took, _ in stretch)
    header = [
        "",
        "added to training",
        "call",
        "waiting",
        "slower steps",
        "copies",
        "times ours",
        "pairs",
    ]
    return (
        f"{first['num_parameters'] / 1e6:.1f}M float32 parameters, SGD on {data['threads']} thread(s), a "
        f"checkpoint every {data['steps']} steps of {step_s:.2f} s, uploaded to a server that stands for another "
        f"machine: it reads and forgets. Medians over pairs of stretches with and without a checkpoint; one copy "
        f"of the weights takes {1e3 * copy_s:.0f} ms.\n\n{results.table(header, rows)}"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", choices=NAMES, help="measure this one alone, and keep the others' figures")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of training; the service's trainer takes one")
    options = parser.parse_args()
    settings = {"steps": options.steps, "threads": options.threads}
    path = results.RESULTS / "checkpointing.json"
    known = json.loads(path.read_text()) if options.method and path.exists() else {}
    methods = known.get("methods", {}) if {name: known.get(name) for name in settings} == settings else {}
    for method in [options.method] if options.method else NAMES:
        methods[method] = measure(method, rounds=options.rounds, **settings)
        print(f"{NAMES[method]}: {1e3 * added_s(methods[method]):.0f} ms", file=sys.stderr)
    data = settings | {"methods": methods}
    results.write("checkpointing", data=data, text=markdown(data))


if __name__ == "__main__":
    main()
