"""What checkpoints add to the time of training, background work counted in, beside the usual ways to take them.

`python -m benchmarks.checkpointing` trains 50M float32 parameters on the CPU and stores checkpoints in a server
that stands for one on another machine: it reads and forgets what is large (`benchmarks.forgetful`). Each method
runs in a process of its own (`benchmarks.checkpointing_job`): a stretch of steps that begins with a checkpoint,
then as many steps without one, in turn. A stretch is as long as an upload, so what the upload takes from the steps
is in the figure.

A machine that shares its hardware with others changes its speed within a second by more than a checkpoint costs:
steps take 12 % more or less, and three neighbours are alike. So a stretch is two steps where the upload allows it,
and is compared with the mean of the two around it, which a steady drift leaves out. The figure is the mean of the
middle half of these differences; its 95 % interval comes from resampling runs of neighbours, since what slows one
slows the next. `none` takes no checkpoints and must come out at 0; `copy` copies the weights, uploads nothing, and
must come out at what its call takes by the clock. The table says whether they do.

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
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from benchmarks import processes, results
from benchmarks.store_fold import running_store, wait_until_listening
from services.stack import seaweedfs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NAMES = {
    "none": "nothing (what the measurement itself is off by)",
    "copy": "one copy in memory, and no upload",
    "publisher": "CheckpointPublisher",
    "blocking": "torch.save + boto3, blocking",
    "thread": "copy, then torch.save + boto3 in a thread",
    "ray": "Ray Train's report(checkpoint=...)",
    "dcp": "DCP async_save, boto3 in a thread",
    "dcp-process": "DCP async_save in a process, boto3 in a thread",
}
OURS = "publisher"
CONTROLS = {"none", "copy"}
_RUN = 4  # stretches that are resampled together
COPIES_ALLOWED, TIMES_BLOCKING = 2.0, 20.0


def measure(method: str, *, seconds: float, threads: int) -> dict[str, Any]:
    """Seconds of every stretch of one method."""
    with (
        tempfile.TemporaryDirectory(prefix="wa-bench-") as name,
        running_store(Path(name)) as config,
        forgetful(config.ports[0]) as endpoint_url,
    ):
        argv = [sys.executable, "-m", "benchmarks.checkpointing_job", method, endpoint_url]
        argv += [config.access_key, config.secret_key, config.bucket, str(seconds), str(threads)]
        return dict(json.loads(processes.run(argv).output.splitlines()[-1]))


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


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, and the 95 % interval around it."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Estimate:
        """The mean of the middle half, resampled: those far out were somebody else's doing."""
        random = Random(0)  # noqa: S311  the same interval for the same figures
        runs = [samples[at : at + _RUN] for at in range(max(1, len(samples) - _RUN + 1))]
        drawn = (random.choices(runs, k=-(-len(samples) // _RUN)) for _ in range(2000))
        means = sorted(_middle_mean([sample for run in some for sample in run]) for some in drawn)
        return cls(_middle_mean(samples), means[50], means[-51])

    def __str__(self) -> str:
        return f"{1e3 * self.value:.0f} ms ({1e3 * self.low:.0f} to {1e3 * self.high:.0f})"


def _middle_mean(samples: Sequence[float]) -> float:
    cut = len(samples) // 4
    return fmean(sorted(samples)[cut : len(samples) - cut])


def differences_s(found: dict[str, Any]) -> list[float]:
    """Seconds that each stretch with a checkpoint took longer than the mean of the two around it."""
    without = [took for took, _ in found["without"]]
    means = (fmean(both) for both in pairwise(without))
    return [took - mean for (took, _), mean in zip(found["with"], means, strict=True)]


def added_s(found: dict[str, Any]) -> float:
    """Seconds that a checkpoint adds to training."""
    return Estimate.of(differences_s(found)).value


def _row(name: str, found: dict[str, Any], *, copy_s: float, ours_s: float | None) -> list[str]:
    added, call_s = Estimate.of(differences_s(found)), median(found["call"])
    return [
        NAMES[name],
        str(added),
        f"{1e3 * call_s:.0f} ms",
        f"{1e3 * (added.value - call_s):.0f} ms",
        f"{1e3 * (_off_processor_s(found['with']) - _off_processor_s(found['without'])):.0f} ms",
        f"{added.value / copy_s:.1f}",
        f"{added.value / ours_s:.1f}" if ours_s else "",
        f"{len(found['call'])} of {found['num_steps']} steps",
    ]


def _off_processor_s(stretches: Sequence[Sequence[float]]) -> float:
    return median(took - ran for took, ran in stretches)


def markdown(data: dict[str, Any]) -> str:
    """The table that people read."""
    methods = data["methods"]
    copy_s = median(found["copy_s"] for found in methods.values())
    ours_s = added_s(methods[OURS]) if OURS in methods else None
    rows = [_row(name, found, copy_s=copy_s, ours_s=ours_s) for name in NAMES if (found := methods.get(name))]
    step_s = median(took / found["num_steps"] for found in methods.values() for took, _ in found["without"])
    header = ["", "added to training (95 %)", "in the call", "in the steps", "off the processor", "copies"]
    header += ["times ours", "stretches"]
    num_parameters = next(iter(methods.values()))["num_parameters"]
    return (
        f"{num_parameters / 1e6:.1f}M float32 parameters, SGD on {data['threads']} thread(s), steps of "
        f"{step_s:.2f} s, uploaded to a server that stands for another machine: it reads and forgets. A stretch "
        f"with a checkpoint lasts until it is stored, and is compared with the two around it; one copy of the "
        f"weights takes {1e3 * copy_s:.0f} ms. {_controls(methods)}\n\n{results.table(header, rows)}"
    )


def _controls(methods: dict[str, Any]) -> str:
    """Whether what is known beforehand comes out."""
    said = []
    for name in CONTROLS & methods.keys():
        expected = median(methods[name]["call"])
        found = Estimate.of(differences_s(methods[name]))
        said.append(
            f"The control `{name}` should add {1e3 * expected:.0f} ms and adds {found}"
            f"{'' if found.low <= expected <= found.high else ': **the method is off**'}."
        )
    return " ".join(sorted(said))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--method", choices=NAMES, help="measure this one alone, and keep the others' figures")
    parser.add_argument("--seconds", type=float, default=60.0, help="of ours and the controls; others get a third")
    parser.add_argument("--threads", type=int, default=1, help="of training; the service's trainer takes one")
    options = parser.parse_args()
    settings = {"seconds": options.seconds, "threads": options.threads}
    path = results.RESULTS / "checkpointing.json"
    known = json.loads(path.read_text()) if options.method and path.exists() else {}
    methods = known.get("methods", {}) if {name: known.get(name) for name in settings} == settings else {}
    for method in [options.method] if options.method else NAMES:
        is_exact = method in CONTROLS or method == OURS  # what costs ten times as much need not be known as well
        seconds = options.seconds if is_exact else options.seconds / 3
        methods[method] = measure(method, seconds=seconds, threads=options.threads)
        print(f"{NAMES[method]}: {Estimate.of(differences_s(methods[method]))}", file=sys.stderr)
    data = settings | {"methods": methods}
    results.write("checkpointing", data=data, text=markdown(data))


if __name__ == "__main__":
    main()
