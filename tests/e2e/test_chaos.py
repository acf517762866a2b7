"""Real processes killed with SIGKILL, one at a time, while the main job runs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from support.averaging import same_bits
from support.stack import RunningStack, descendants, eventually, kill, submission
from wa_core.averaging.rules import parse_rule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.catalog.averages import Generations
from wa_core.catalog.runs import RunLog
from wa_core.clock import SystemClock
from wa_core.tensors import read_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]


def victim(stack: RunningStack, role: str) -> int:
    """The pid of a process by its role, as it is now."""
    pids = stack.pids()
    if role in pids:
        return pids[role]
    above, sign = {
        "worker": (pids["ray"], "RayTrainWorker"),
        "driver": (pids["runner"], "services.trainer.driver"),
    }[role]
    found: int = eventually(
        lambda: next((pid for pid, command in descendants(above) if sign in command), None),
        timeout_s=30,
        what=f"a {role} process",
    )
    return found


def has_started_averaging(stack: RunningStack, run_id: str) -> bool:
    """Whether something has been folded while training still goes on."""
    with stack.client() as client:
        run = client.run(run_id)
        assert run["state"] not in {"succeeded", "failed"}, run
        return bool(run["step"]) and any(average["n_averaged"] for average in client.averages(run_id))


def recomputed(stack: RunningStack, run_id: str, *, rule: str) -> dict[str, torch.Tensor]:
    """The average of the committed checkpoints of the surviving lineage, read from the bucket and folded anew."""
    store = stack.store()
    log = RunLog(store, run_id, clock=SystemClock())
    log.refresh()
    shadow = ShadowWeights(parse_rule(rule), dtype=torch.float64)
    for entry in log.lineage:
        shadow.fold(read_checkpoint(store.stream(entry.files["model.safetensors"].key)).tensors, step=entry.step)
    return without_statistics(shadow.value())


def without_statistics(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that recalibration must not change."""
    return {name: weights[name] for name in weights if "running_" not in name and "num_batches" not in name}


def finished(stack: RunningStack, run_id: str) -> dict[str, Any]:
    """The run once it has ended."""
    with stack.client() as client:
        return client.wait(run_id)


@pytest.mark.parametrize("role", ["averager", "worker", "driver", "runner", "store", "api", "ray"])
def test_a_kill_changes_nothing(stack: RunningStack, role: str, tmp_path: Path) -> None:
    """F1, F9, F15, F16: the run succeeds, and its SWA is bit for bit that of its committed checkpoints."""
    rule = "swa:start_step=40"
    with stack.client() as client:
        run_id = client.submit(submission(averages=[{"name": "swa", "rule": rule}]))["run_id"]
    eventually(lambda: has_started_averaging(stack, run_id), timeout_s=120, what="the first fold")
    kill(victim(stack, role))
    run = finished(stack, run_id)
    assert run["state"] == "succeeded", run
    assert (run["attempt"] > 1) == (role in {"worker", "driver", "runner", "ray"})
    with stack.client() as client:
        path = client.download(run_id, "swa", tmp_path / "swa.safetensors")
    assert same_bits(without_statistics(load_file(path)), recomputed(stack, run_id, rule=rule))
    manifest = Generations(stack.store(), run_id, "swa").newest()
    assert manifest is not None
    assert (
        len(manifest.folded)
        == len(set(manifest.folded))
        == len(range(40, run["step"] + 1, 20)) + (run["step"] % 20 > 0)
    )


def test_two_averagers_fold_nothing_twice(stack: RunningStack, tmp_path: Path) -> None:
    """A second averager on the same bucket: one takes the run, or one of two that took it at once is `fenced`."""
    rule = "swa:start_step=20"
    environment = os.environ | {
        "WA_STORE_URL": f"s3://{stack.said['bucket']}",
        "WA_S3_ENDPOINT": stack.said["s3_endpoint"],
        "WA_S3_ACCESS_KEY": stack.said["access_key"],
        "WA_S3_SECRET_KEY": stack.said["secret_key"],
        "WA_LOG_FORMAT": "json",
    }
    said = tmp_path / "second.log"
    with said.open("wb") as log, stack.client() as client:
        second = subprocess.Popen([sys.executable, "-m", "services.averager"], env=environment, stderr=log)
        try:
            eventually(lambda: "averager_ready" in said.read_text(), timeout_s=60, what="the second averager")
            request = submission(averages=[{"name": "swa", "rule": rule}], checkpoint={"every_steps": 5})
            run_id = client.submit(request)["run_id"]
            run = finished(stack, run_id)
            assert second.poll() is None
        finally:
            second.terminate()
            assert second.wait(timeout=15) == 0
    assert run["state"] == "succeeded", run
    logs = [said.read_text(), (stack.data / "logs" / "averager.log").read_text()]
    at_work = [log for log in logs if any("published" in line and run_id in line for line in log.splitlines())]
    assert len(at_work) == 1 or any("fenced" in log for log in logs)
    with stack.client() as client:
        path = client.download(run_id, "swa", tmp_path / "swa.safetensors")
    assert same_bits(without_statistics(load_file(path)), recomputed(stack, run_id, rule=rule))
    manifest = Generations(stack.store(), run_id, "swa").newest()
    assert manifest is not None
    assert len(manifest.folded) == len(set(manifest.folded))
