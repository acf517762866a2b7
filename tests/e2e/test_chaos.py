"""Real processes killed with SIGKILL while the main job runs."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from support.averaging import same_bits
from support.descendants import descendants
from support.patience import eventually
from support.stack import RunningStack, kill, submission
from wa_core.averaging.rules import parse_rule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.catalog.averages import Generations
from wa_core.catalog.runs import RunLog
from wa_core.clock import SystemClock
from wa_core.tensors import read_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from wa_core.records import CheckpointCommitted

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


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
        lambda: next((pid for pid, command in descendants(above).items() if sign in command), None),
        what=f"a {role} process",
    )
    return found


def has_started_averaging(stack: RunningStack, run_id: str) -> bool:
    """Whether something has been folded while training still goes on."""
    with stack.client() as client:
        run = client.run(run_id)
        assert run["state"] not in {"succeeded", "failed"}, run
        return bool(run["step"]) and any(average["n_averaged"] for average in client.averages(run_id))


def last_checkpoint(stack: RunningStack, run_id: str) -> dict[str, torch.Tensor]:
    """The raw weights that a run ended with."""
    return weights_of(stack, surviving(stack, run_id)[-1])


def surviving(stack: RunningStack, run_id: str) -> list[CheckpointCommitted]:
    """The committed checkpoints of the surviving lineage."""
    log = RunLog(stack.store(), run_id, clock=SystemClock())
    log.refresh()
    return log.lineage


def weights_of(stack: RunningStack, entry: CheckpointCommitted) -> dict[str, torch.Tensor]:
    """A checkpoint, read from the bucket."""
    return read_checkpoint(stack.store().stream(entry.files["model.safetensors"].key)).tensors


def recomputed(stack: RunningStack, run_id: str, *, rule: str) -> dict[str, torch.Tensor]:
    """The average of the surviving checkpoints, folded anew."""
    shadow = ShadowWeights(parse_rule(rule), dtype=torch.float64)
    for entry in surviving(stack, run_id):
        shadow.fold(weights_of(stack, entry), step=entry.step)
    return without_statistics(shadow.value())


def without_statistics(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that recalibration must not change."""
    return {name: weights[name] for name in weights if "running_" not in name and "num_batches" not in name}


def finished(stack: RunningStack, run_id: str) -> dict[str, Any]:
    """The run once it has ended."""
    with stack.client() as client:
        return client.wait(run_id)


STARTS_AGAIN = {"worker", "driver", "runner", "ray"}  # with one of them an attempt dies


# What training needs goes first: until it goes on there is time for the others, however fast the machine is.
@pytest.mark.parametrize(
    "roles", [("worker", "averager", "store"), ("driver", "runner", "api"), ("ray",)], ids=" and ".join
)
def test_kills_change_nothing(
    stack: RunningStack, main_run: dict[str, Any], roles: tuple[str, ...], tmp_path: Path
) -> None:
    """F1, F9, F15, F16: the run ends with an undisturbed one's weights, and its SWA is exact."""
    rule = "swa:start_step=40"
    with stack.client() as client:
        run_id = client.submit(submission(averages=[{"name": "swa", "rule": rule}]))["run_id"]
    for role in roles:
        eventually(lambda: has_started_averaging(stack, run_id), timeout_s=120, what="the first fold")
        kill(victim(stack, role))
    run = finished(stack, run_id)
    assert run["state"] == "succeeded", run
    assert (run["attempt"] > 1) == bool(STARTS_AGAIN & {*roles})
    assert same_bits(last_checkpoint(stack, run_id), last_checkpoint(stack, main_run["run_id"]))
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
            request = submission(
                config={"epochs": 4, "lr": 0.1},
                averages=[{"name": "swa", "rule": rule}],
                checkpoint={"every_steps": 5},
            )
            run_id = client.submit(request)["run_id"]
            run = finished(stack, run_id)
            assert second.poll() is None
        finally:
            second.terminate()
            assert second.wait(timeout=60) == 0
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
