"""The averager's memory while it folds one large checkpoint into four averages.

`python -m benchmarks.averager_memory` puts a checkpoint of `--size-gb` into a real SeaweedFS and lets one real
averager (`python -m services.averager`) fold it into four averages, whose accumulators are far larger than what it
may keep in memory. The peak of its resident memory is what the kernel says (`VmHWM`). With float32 accumulators,
as here, all of it takes about fourteen times the checkpoint's size on disk for the time being. Writes
`benchmarks/results/averager_memory-SIZE.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import results, testbed
from support.seaweed import running_seaweed
from support.trained import TrainedRun
from support.workers import Workers, averager_settings
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.catalog.files import put_path
from wa_core.records import AverageRequest, CheckpointCommitted

if TYPE_CHECKING:
    from support.nursery import AveragerProcess

assert testbed.TESTS.is_dir()

RULES = {"swa": "swa", "ema": "ema:half_life=30", "slow": "ema:half_life=300", "power": "power:sigma_rel=0.1"}
_TENSOR_BYTES = 16_000_000


def write_checkpoint(path: Path, size_gb: float) -> None:
    """A float32 model of normal numbers, a tensor at a time."""
    number = max(1, round(size_gb * 1e9 / _TENSOR_BYTES))
    header = {
        f"layer{n}.weight": {
            "dtype": "F32",
            "shape": [_TENSOR_BYTES // 4],
            "data_offsets": [n * _TENSOR_BYTES, (n + 1) * _TENSOR_BYTES],
        }
        for n in range(number)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draw = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(number):
            file.write(draw.standard_normal(_TENSOR_BYTES // 4, dtype=np.float32).tobytes())


def commit(run: TrainedRun, path: Path) -> None:
    """Upload the file and put it into the run's log."""
    prefix = layout.checkpoint_prefix(run.run_id, attempt=1, step=10, nonce=layout.new_nonce())
    ref = put_path(run.store, prefix + layout.MODEL_FILE, path)
    run.log.append(CheckpointCommitted(step=10, files={layout.MODEL_FILE: ref}, spec_digest="0" * 64))


def wait_until_published(run: TrainedRun, averager: AveragerProcess) -> None:
    """Until every average has a generation."""
    while not all(Generations(run.store, run.run_id, name).numbers() for name in RULES):
        assert averager.is_alive, averager.log.read_text()
        time.sleep(0.5)


def measure(size_gb: float, memory_mb: int) -> dict[str, Any]:
    """Peak memory before and after, and the time."""
    with tempfile.TemporaryDirectory(prefix="wa-bench-") as name, running_seaweed(Path(name) / "store") as seaweed:
        folder, store = Path(name), seaweed.new_store()
        requests = {
            name: AverageRequest(name=name, rule=rule, accumulator_dtype="float32") for name, rule in RULES.items()
        }
        run = TrainedRun(store, averages=requests)
        path = folder / "checkpoint.safetensors"
        write_checkpoint(path, size_gb)
        size_bytes = path.stat().st_size
        commit(run, path)
        path.unlink()
        settings = averager_settings(seaweed, endpoint_url=seaweed.endpoint_url, bucket=store.bucket)
        settings["WA_ACCUMULATOR_MEMORY_MB"] = str(memory_mb)
        with Workers(folder, settings) as workers:
            averager = workers.start()
            averager.wait_until_ready(timeout_s=60)
            idle_bytes, began = averager.peak_rss_bytes, time.monotonic()
            wait_until_published(run, averager)
            return {
                "size_bytes": size_bytes,
                "num_averages": len(RULES),
                "accumulator_memory_mb": memory_mb,
                "idle_rss_bytes": idle_bytes,
                "peak_rss_bytes": averager.peak_rss_bytes,
                "took_s": time.monotonic() - began,
            }


def markdown(data: dict[str, Any]) -> str:
    """What people read."""
    header = [
        "checkpoint",
        "averages",
        "memory for accumulators",
        "memory at rest",
        "peak",
        "all published after",
    ]
    row = [
        f"{data['size_bytes'] / 1e9:.2f} GB",
        data["num_averages"],
        f"{data['accumulator_memory_mb']} MB",
        f"{data['idle_rss_bytes'] / 1e6:.0f} MB",
        f"{data['peak_rss_bytes'] / 1e6:.0f} MB",
        f"{data['took_s']:.0f} s",
    ]
    return f"One averager and one large float32 checkpoint:\n\n{results.table(header, [row])}"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size-gb", type=float, default=3.0)
    parser.add_argument("--accumulator-memory-mb", type=int, default=256)
    options = parser.parse_args()
    data = measure(options.size_gb, options.accumulator_memory_mb)
    results.write(f"averager_memory-{options.size_gb:g}GB", data=data, text=markdown(data))


if __name__ == "__main__":
    main()
