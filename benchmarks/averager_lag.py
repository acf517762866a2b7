"""How long a commit takes to be in a published average, and how much of the store's line that takes.

`python -m benchmarks.averager_lag` starts one real averager (`python -m services.averager`) on a real SeaweedFS,
commits checkpoints one by one, and waits each time until a generation that holds it is there. Then it counts, at a
proxy, the bytes of each checkpoint that one averager reads for one, two and four averages. Writes
`benchmarks/results/averager_lag.{json,md}`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import results, testbed
from support.proxy import FaultProxy
from support.seaweed import running_seaweed
from support.trained import TrainedRun
from support.workers import Workers, averager_settings
from wa_core import layout
from wa_core.catalog.averages import Generations

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.seaweed import Seaweed
    from wa_core.store.base import ObjectStore

assert testbed.TESTS.is_dir()

_TENSORS = 25
_LOOK_EVERY_S = 0.02


def model(step: int, size_mb: float) -> dict[str, torch.Tensor]:
    """A model of so many MB in tensors of equal size."""
    draw = torch.Generator().manual_seed(step)
    return {f"w{n}": torch.randn(int(size_mb * 1e6 / 4 / _TENSORS), generator=draw) for n in range(_TENSORS)}


def lag_of(run: TrainedRun, step: int, size_mb: float) -> float:
    """Seconds from the commit of a checkpoint to the first generation that holds it."""
    entry = run.checkpoint(step, model(step, size_mb))
    committed = time.perf_counter()
    generations, number = Generations(run.store, run.run_id, "swa"), 0
    while True:
        for number in generations.numbers(after=number):  # noqa: B020  the newest seen so far
            if generations.fetch(number).cursor >= entry.seq:
                return time.perf_counter() - committed
        time.sleep(_LOOK_EVERY_S)


@contextmanager
def averager_on(seaweed: Seaweed, folder: Path, *, store_bucket: str, endpoint_url: str) -> Iterator[None]:
    """One averager, ready."""
    settings = averager_settings(seaweed, endpoint_url=endpoint_url, bucket=store_bucket)
    folder.mkdir()
    with Workers(folder, settings) as workers:
        workers.start().wait_until_ready(timeout_s=60)
        yield


def measure_lag(seaweed: Seaweed, folder: Path, *, size_mb: float, rounds: int) -> list[float]:
    """Lags of one SWA, after a first checkpoint that does not count."""
    store = seaweed.new_store()
    run = TrainedRun(store, averages={"swa": "swa"})
    with averager_on(seaweed, folder, store_bucket=store.bucket, endpoint_url=seaweed.endpoint_url):
        lag_of(run, 1, size_mb)
        lags = []
        for step in range(2, rounds + 2):
            wait_until_assessed(store, run)
            lags.append(lag_of(run, step, size_mb))
            print(f"lag of {size_mb:g} MB: {lags[-1]:.2f} s", file=sys.stderr)
        return lags


def wait_until_assessed(store: ObjectStore, run: TrainedRun) -> None:
    """Until the newest generation has been measured, so that this does not disturb the next lag."""
    generations = Generations(store, run.run_id, "swa")
    while generations.assessed_numbers()[-1:] != generations.numbers()[-1:]:
        time.sleep(_LOOK_EVERY_S)


def measure_reads(seaweed: Seaweed, folder: Path, *, num_averages: int, size_mb: float) -> list[float]:
    """Bytes that crossed the line for each checkpoint, in units of its size."""
    store = seaweed.new_store()
    rules = ["swa", "ema:half_life=30", "ema:half_life=300", "power:sigma_rel=0.1"][:num_averages]
    run = TrainedRun(store, averages={f"a{number}": rule for number, rule in enumerate(rules)})
    for step in (10, 20, 30):
        run.checkpoint(step, model(step, size_mb))
    run.finish()
    with (
        FaultProxy(seaweed.endpoint_url) as proxy,
        averager_on(seaweed, folder, store_bucket=store.bucket, endpoint_url=proxy.endpoint_url),
    ):
        run.wait_until_succeeded(timeout_s=600)
        refs = [entry.files[layout.MODEL_FILE] for entry in run.log.lineage]
        return [proxy.traffic[ref.key].received_bytes / ref.size_bytes for ref in refs]


def measure(size_mb: float, rounds: int) -> dict[str, Any]:
    """Lags in seconds, and reads by number of averages."""
    with tempfile.TemporaryDirectory(prefix="wa-bench-") as name, running_seaweed(Path(name) / "store") as seaweed:
        folder = Path(name)
        lags = {
            str(size): measure_lag(seaweed, folder / f"lag-{size}", size_mb=size, rounds=rounds)
            for size in (1.0, size_mb)
        }
        reads = {
            str(number): measure_reads(seaweed, folder / f"reads-{number}", num_averages=number, size_mb=20)
            for number in (1, 2, 4)
        }
    return {"size_mb": size_mb, "rounds": rounds, "lag_s": lags, "reads": reads}


def markdown(data: dict[str, Any]) -> str:
    """The tables that people read."""
    lags = [
        [f"{float(size):g} MB", f"{median(lags):.2f} s", f"{min(lags):.2f} to {max(lags):.2f} s"]
        for size, lags in data["lag_s"].items()
    ]
    reads = [[number, ", ".join(f"{read:.4f}" for read in found)] for number, found in data["reads"].items()]
    return (
        "From the commit of a checkpoint to the first generation of one SWA that holds it, on a SeaweedFS on this "
        f"machine; {data['rounds']} checkpoints.\n\n{results.table(['checkpoint', 'median', 'all'], lags)}\n"
        "Bytes of each checkpoint that crossed the line, counted at a proxy, in units of its size:\n\n"
        f"{results.table(['averages', 'of each checkpoint'], reads)}"
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size-mb", type=float, default=100.0)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    data = measure(options.size_mb, options.rounds)
    results.write("averager_lag", data=data, text=markdown(data))


if __name__ == "__main__":
    main()
