"""A bucket full of runs for the API's load: most have ended, some wait, ten train.

They are made in memory and copied, which is several times faster than writing each record to the server in turn.
"""

from __future__ import annotations

import asyncio
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks import testbed
from support.api import ApiRun
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.records import Succeeded, TrainingFinished
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from wa_core.store.s3 import S3Store

assert testbed.TESTS.is_dir()

NUM_TRAINING, NUM_WAITING = 10, 20


@dataclass
class Bucket:
    """The store, what is in it, and when the commits of later entries (run id, seq) began."""

    store: S3Store
    run_ids: list[str]
    training: list[ApiRun]
    committed_at: dict[tuple[str, int], float] = field(default_factory=dict)

    @property
    def training_ids(self) -> list[str]:
        """The runs that train."""
        return [run.run_id for run in self.training]

    def commits_of(self, run_id: str) -> list[tuple[int, float]]:
        """The later entries of a run: seq, and when its commit began."""
        return [(seq, at) for (id_, seq), at in self.committed_at.items() if id_ == run_id]

    async def train(self, *, every_s: float) -> None:
        """Let the runs that train commit a checkpoint each, again and again, until cancelled."""
        while True:
            for run in self.training:
                began = time.perf_counter()
                await asyncio.to_thread(self._step, run)
                await asyncio.sleep(max(0.0, every_s / len(self.training) - (time.perf_counter() - began)))

    def _step(self, run: ApiRun) -> None:
        step = run.log.lineage[-1].step + 20
        run.beat(step=step, total_steps=1_000_000, loss=1 / step)
        began = time.perf_counter()  # whoever follows the run may be told before the commit has returned
        entry = run.checkpoint(step, loss=1 / step)
        self.committed_at[run.run_id, entry.seq] = began


def fill(store: S3Store, *, num_runs: int) -> Bucket:
    """Put runs into an empty bucket."""
    began = time.perf_counter()
    runs = [_run(number, of=num_runs) for number in range(num_runs)]
    objects = [(info.key, run.store.get(info.key)) for run in runs for info in run.store.list("")]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda one: store.put(*one), objects))
    print(f"{num_runs} runs, {len(objects)} objects in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    training = runs[-NUM_TRAINING - NUM_WAITING : -NUM_WAITING]
    for run in training:
        run.store = store
        run.log._store = store  # noqa: SLF001  the same log, now in the bucket
    return Bucket(store, [run.run_id for run in runs], training)


def large_average(store: S3Store, *, size_bytes: int) -> tuple[str, str, int]:
    """A run with an average of so many bytes: its id, the key of the weights, and their size."""
    run = ApiRun(store).start()
    run.checkpoint(20)
    run.fold(body=bytes(size_bytes))
    record = Generations(store, run.run_id, "swa").newest_assessment()
    assert record is not None
    return run.run_id, record.files[layout.MODEL_FILE].key, size_bytes


def _run(number: int, *, of: int) -> ApiRun:
    """One run, in a store of its own."""
    store = MemoryStore()
    run = ApiRun(store, labels={"team": ("vision", "text")[number % 2], "number": str(number)})
    if number >= of - NUM_WAITING:
        return run
    store.delete(layout.queue_marker(run.run_id, priority=50))
    run.start()
    for step in (20, 40, 60):
        run.checkpoint(step, loss=1 / step)
    run.fold(body=b"weights")
    lines = "".join(f'{{"step": {step}, "loss": {1 / step}}}\n' for step in range(1, 61))
    store.put(layout.metrics_part(run.run_id, attempt=1, part=1), lines.encode())
    if number < of - NUM_WAITING - NUM_TRAINING:
        run.log.append(TrainingFinished(step=60))
        run.log.append(Succeeded())
        store.delete(layout.active_marker(run.run_id))
    return run
