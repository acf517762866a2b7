"""The averager as a process: its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from support.patience import eventually
from support.runs import random_weights
from support.training import start_attempt
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.catalog.files import put_file
from wa_core.catalog.runs import RunLog, submit
from wa_core.clock import SystemClock
from wa_core.records import AverageRequest, CheckpointCommitted, RunRequest
from wa_core.store.local import LocalStore
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from pathlib import Path

NUM_CHECKPOINTS = 300


def test_f28_an_averager_under_load_ends_within_ten_seconds(tmp_path: Path) -> None:
    """F28: SIGTERM with hundreds of checkpoints still to fold: status 0, in time, and no work folder is left."""
    store, scratch = LocalStore(tmp_path / "bucket"), tmp_path / "scratch"
    run_id = with_checkpoints(store, NUM_CHECKPOINTS)
    settings = {"WA_STORE_URL": f"file://{tmp_path}/bucket", "WA_SCRATCH_DIR": str(scratch)}
    averager = subprocess.Popen(
        [sys.executable, "-m", "services.averager"], env=os.environ | settings, stderr=subprocess.PIPE, text=True
    )
    try:
        generations = Generations(store, run_id, "swa")
        eventually(generations.numbers, what="the first generation")
        averager.send_signal(signal.SIGTERM)
        asked_at = time.monotonic()
        _, said = averager.communicate(timeout=60)
    finally:
        averager.kill()

    assert time.monotonic() - asked_at < 10
    assert averager.returncode == 0
    assert "Traceback" not in said
    assert not [path for path in scratch.rglob("*") if path.is_file()]
    newest = generations.fetch(generations.numbers()[-1])
    assert len(newest.folded) < NUM_CHECKPOINTS


def with_checkpoints(store: LocalStore, number: int) -> str:
    """A run that trains, with so many checkpoints that nobody has folded."""
    request = RunRequest(
        recipe="services.recipes.digits:Digits", averages=[AverageRequest(name="swa", rule="swa")]
    )
    run_id = submit(store, request, clock=SystemClock()).run_id
    start_attempt(store, run_id)
    log = RunLog(store, run_id, clock=SystemClock())
    log.refresh()
    weights = serialize(random_weights(1))
    for step in range(1, number + 1):
        prefix = layout.checkpoint_prefix(run_id, attempt=1, step=step, nonce=layout.new_nonce())
        ref = put_file(store, prefix + layout.MODEL_FILE, weights)
        log.append(CheckpointCommitted(step=step, files={layout.MODEL_FILE: ref}, spec_digest="0" * 64))
    return run_id
