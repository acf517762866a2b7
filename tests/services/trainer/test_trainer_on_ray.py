"""The trainer whole, on real Ray: runner process, driver, two DDP workers, with kills on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from support.descendants import descendants, is_alive
from support.patience import eventually
from support.training import (
    differing_tensors,
    digits_request,
    log_of,
    start_attempt,
    submit_run,
    train_with_gloo,
    weights_of,
)
from wa_core.records import CancelRequested, RunRequest, RunState
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A runner process whose drivers start a Ray of their own; everything below it ends with it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "services.trainer"],
        env={**os.environ, "WA_STORE_URL": f"file://{tmp_path}", "WA_POLL_INTERVAL_S": "0.2"},
    )
    yield process
    below = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    eventually(lambda: not any(map(is_alive, below)), what="the end of all that it had started")


def long_request(*, epochs: int) -> RunRequest:
    """Two workers; 11 steps an epoch."""
    return digits_request(num_workers=2, every_steps=20, epochs=epochs)


@pytest.mark.soak  # tests/e2e/test_chaos.py kills each of them in a shorter run
def test_a_run_whose_driver_and_worker_are_killed_ends_bit_identical(
    tmp_path: Path, runner: subprocess.Popen[bytes]
) -> None:
    """F15, F16: SIGKILL of the driver and of a worker cost attempts, not one bit of the weights."""
    store = LocalStore(tmp_path)
    run_id = submit_run(store, long_request(epochs=60))
    eventually(lambda: len(log_of(store, run_id).lineage) >= 3, timeout_s=240, what="training")
    kill_one(runner.pid, "services.trainer.driver")
    eventually(lambda: log_of(store, run_id).attempt == 2, timeout_s=240, what="recovery")
    num_before = len(log_of(store, run_id).lineage)
    eventually(lambda: len(log_of(store, run_id).lineage) >= num_before + 3, timeout_s=240, what="training anew")
    kill_one(runner.pid, "RayTrainWorker")

    eventually(
        lambda: log_of(store, run_id).state in {RunState.FINALIZING, RunState.FAILED},
        timeout_s=240,
        what="the end",
    )

    log = log_of(store, run_id)
    reasons = [entry.reason for entry in log.entries if entry.kind == "attempt_failed"]
    assert reasons == ["driver_died", "worker_died"]
    assert log.entries[-1].kind == "training_finished"
    expected = reference_weights(tmp_path / "reference")
    assert differing_tensors(weights_of(store, log.lineage[-1]), expected) == []


def test_a_cancelled_run_keeps_its_last_step(tmp_path: Path, runner: subprocess.Popen[bytes]) -> None:
    """A cancel ends training on Ray within seconds, after a last checkpoint; the runner then leaves in order."""
    store = LocalStore(tmp_path)
    run_id = submit_run(store, long_request(epochs=5_000))
    eventually(lambda: log_of(store, run_id).lineage, timeout_s=240, what="training")

    log_of(store, run_id).append(CancelRequested())
    eventually(lambda: log_of(store, run_id).state is RunState.CANCELLED, what="the end")

    kinds = [entry.kind for entry in log_of(store, run_id).entries]
    assert kinds[-2:] == ["checkpoint", "cancelled"]
    assert "attempt_failed" not in kinds


def kill_one(root_pid: int, name: str) -> None:
    """SIGKILL one process below `root_pid` whose command line holds `name`."""
    found = [pid for pid, command in descendants(root_pid).items() if name in command]
    assert found, f"there is no {name} below {root_pid}"
    os.kill(found[0], signal.SIGKILL)


def reference_weights(folder: Path) -> dict[str, object]:
    """The last weights of the same run, undisturbed and without Ray."""
    store = LocalStore(folder)
    run_id = submit_run(store, long_request(epochs=60))
    train_with_gloo(store, run_id, attempt=start_attempt(store, run_id), world_size=2)
    return weights_of(store, log_of(store, run_id).lineage[-1])
