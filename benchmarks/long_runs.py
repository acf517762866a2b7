"""How long it takes to start on a long run: 10,000 log entries and 10,000 generations, with hints and without.

On a real SeaweedFS of its own: `python -m benchmarks.long_runs [--length 10000] [--rounds 3]`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from services.stack import seaweedfs
from services.stack.seaweedfs import SeaweedConfig
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.catalog.hints import MAX_BEHIND, digest_of, write_log_hint
from wa_core.catalog.runs import RunLog, submit
from wa_core.clock import SystemClock
from wa_core.records import AverageManifest, CheckpointCommitted, Entry, FileRef, RunRequest
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from wa_core.store.base import ObjectStore

CLOCK = SystemClock()


def long_run(store: ObjectStore, *, length: int) -> str:
    """A run with a log and a list of generations of this length, written as the service writes them."""
    made = MemoryStore()
    run_id = submit(made, RunRequest(recipe="a.b:C"), clock=CLOCK).run_id
    entries: list[Entry] = [*RunLog(made, run_id, clock=CLOCK).refresh()]
    digest = digest_of(made.get(layout.log_entry(run_id, 1)))
    while len(entries) < length:
        step = len(entries)
        prefix = layout.checkpoint_prefix(run_id, attempt=1, step=step, nonce=layout.new_nonce())
        files = {
            name: FileRef(key=prefix + name, size_bytes=1, sha256="0" * 64)
            for name in (layout.MODEL_FILE, layout.TRAINER_FILE)
        }
        stamp = {"seq": step + 1, "previous": digest, "at": CLOCK.now(), "attempt": 1}
        entry = CheckpointCommitted(step=step, files=files, spec_digest="0" * 64, **stamp)
        body = entry.model_dump_json().encode()
        made.create(layout.log_entry(run_id, step + 1), body)
        entries.append(entry)
        digest = digest_of(body)
    # As far behind as it ever is: a new one is due at the next entry.
    write_log_hint(made, run_id, entries[: length - MAX_BEHIND])
    generations = Generations(made, run_id, "swa")
    for number in range(1, length + 1):
        record = AverageManifest(
            run_id=run_id,
            name="swa",
            generation=number,
            at=CLOCK.now(),
            rule="swa",
            accumulator_dtype="float64",
            cursor=0,
        )
        generations.commit(record)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda info: store.put(info.key, made.get(info.key)), made.list(layout.run_prefix(run_id))))
    return run_id


@contextmanager
def running_store() -> Iterator[ObjectStore]:
    """A server on free ports, ended by pid."""
    with tempfile.TemporaryDirectory() as folder:
        ports = seaweedfs.free_ports(seaweedfs.NUM_PORTS)
        config = SeaweedConfig(Path(folder), ports, access_key="benchmark", secret_key="benchmark-secret")  # noqa: S106
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        server = subprocess.Popen(seaweedfs.argv(config), env=os.environ | seaweedfs.environment(config), **quiet)
        try:
            seaweedfs.wait_until_ready(config, timeout_s=60, is_alive=lambda: server.poll() is None)
            yield seaweedfs.open_store(config)
        finally:
            server.kill()
            server.wait()
            seaweedfs.remove_sockets(config)


def seconds(call: Callable[[], object], *, rounds: int) -> float:
    """The median time of a call."""
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with running_store() as store:
        run_id = long_run(store, length=asked.length)
        calls: dict[str, Callable[[], object]] = {
            "RunLog.refresh": lambda: RunLog(store, run_id, clock=CLOCK).refresh(),
            "Generations.newest": lambda: Generations(store, run_id, "swa").newest(),
        }
        hinted = {name: seconds(call, rounds=asked.rounds) for name, call in calls.items()}
        store.delete(layout.log_hint(run_id))
        store.delete(layout.generation_hint(run_id, "swa"))
        plain = {name: seconds(call, rounds=1) for name, call in calls.items()}
    for name in calls:
        print(f"{name:20} with hints {hinted[name]:7.3f} s   without {plain[name]:7.3f} s")


if __name__ == "__main__":
    main()
