"""Writes `tests/data/format-v1`: a small whole bucket in format 1, with records of every kind.

It was run once, and what it wrote is frozen: later versions must read it (F27). Run it again only while format 1
has not been released: `PYTHONPATH=.:tests python tests/data/make_format_v1.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from support.averaging import averager, run_until_idle
from support.runs import HandmadeRun, random_weights
from wa_core import layout
from wa_core.catalog.files import put_file
from wa_core.catalog.runs import add_average
from wa_core.records import (
    AttemptFailed,
    AverageRequest,
    Cancelled,
    CancelRequested,
    CheckpointCommitted,
    CheckpointPolicy,
    Failed,
    Heartbeat,
    Paused,
    PauseRequested,
    ResumeRequested,
)
from wa_core.specs import spec_digest
from wa_core.store.local import LocalStore
from wa_core.tensors import pickled, serialize, spec_of

FOLDER = Path(__file__).parent / "format-v1"
AVERAGES = {
    "swa": "swa:start_step=20",
    "ema": "ema:half_life=20",
    "power": "power:sigma_rel=0.1",
    "window": "window:last=2",
}


def succeeded(store: LocalStore) -> HandmadeRun:
    """Averages of every kind, a rewind, a skipped and a rejected checkpoint, an average added after the end."""
    policy = CheckpointPolicy(every_steps=10, keep_last=5, keep_every_steps=50, keep_best=1)
    run = HandmadeRun(store, averages=AVERAGES, checkpoint=policy, labels={"team": "vision"}, config={"lr": 0.1})
    worker = averager(store)
    for step in (10, 20, 30):
        run.checkpoint(step, random_weights(step))
    run_until_idle(worker)
    run.log.append(AttemptFailed(reason="worker_died", message="a worker was killed"))
    run.start_attempt(resumed_from=run.log.lineage[1].seq)
    run.checkpoint(30, random_weights(31))
    run.checkpoint(40, random_weights(40) | {"scale": torch.tensor(float("nan"))})
    run.checkpoint(50, random_weights(50))
    store.put(layout.metrics_part(run.run_id, attempt=1, part=1), b'{"step": 10, "epoch": 1, "loss": 0.5}\n')
    store.put(layout.logs_part(run.run_id, attempt=1, rank=0, part=1), b"step 10 of 50\n")
    beat = Heartbeat(who="trainer", at=run.clock.now(), attempt=2, step=50, total_steps=50, epoch=5)
    store.put(layout.heartbeat(run.run_id, "trainer"), beat.model_dump_json().encode())
    run.finish()
    run_until_idle(worker)
    add_average(store, run.run_id, AverageRequest(name="added", rule="swa"), clock=run.clock)
    run_until_idle(worker)
    lease = Heartbeat(who="averager-1/7/0123abcd", at=run.clock.now(), attempt=2, detail="fold")
    store.put(layout.heartbeat(run.run_id, "averager"), lease.model_dump_json().encode())
    store.delete(layout.queue_marker(run.run_id, priority=50))
    return run


def running(store: LocalStore) -> HandmadeRun:
    """Still going on: two checkpoints, both folded."""
    run = HandmadeRun(store, averages={"swa": "swa"})
    for step in (10, 20):
        run.checkpoint(step, random_weights(step))
    run_until_idle(averager(store))
    released = Heartbeat(who="", at=run.clock.now(), detail="released")
    store.put(layout.heartbeat(run.run_id, "averager"), released.model_dump_json().encode())
    return run


def cancelled(store: LocalStore) -> HandmadeRun:
    """Paused, resumed, cancelled; with a trainer's state beside the weights."""
    run = HandmadeRun(store, averages={})
    prefix = layout.checkpoint_prefix(run.run_id, attempt=1, step=10, nonce=layout.new_nonce())
    weights = random_weights(1)
    bodies = {layout.MODEL_FILE: serialize(weights), layout.TRAINER_FILE: pickled({"step": 10})}
    files = {name: put_file(store, prefix + name, body) for name, body in bodies.items()}
    digest = spec_digest(spec_of(weights))
    run.log.append(
        CheckpointCommitted(step=10, epoch=1, lr=0.1, files=files, spec_digest=digest, metrics={"loss": 1.5})
    )
    run.log.append(PauseRequested())
    run.log.append(Paused())
    run.log.append(ResumeRequested(from_step=10))
    run.log.append(CancelRequested())
    run.log.append(Cancelled())
    return run


def failed(store: LocalStore) -> HandmadeRun:
    """Ended badly."""
    run = HandmadeRun(store, averages={"swa": "swa"})
    run.log.append(AttemptFailed(reason="user_code", message="ValueError: no"))
    run.log.append(Failed(reason="user_code", message="ValueError: no"))
    return run


def main() -> None:
    """Write the bucket, and beside it which run is which."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    store = LocalStore(FOLDER / "bucket")
    runs = {make.__name__: make(store).run_id for make in (succeeded, running, cancelled, failed)}
    (FOLDER / "bucket" / ".tmp").rmdir()
    (FOLDER / "runs.json").write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
