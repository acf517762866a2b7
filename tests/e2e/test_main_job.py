"""The main job on the embedded stack: submit, train with DDP, fold, recalibrate, download."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from services.recipes.loader import load_recipe
from support.averaging import exact_mean
from wa_core.catalog.runs import RunLog
from wa_core.clock import SystemClock
from wa_core.tensors import read_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from support.stack import RunningStack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]


@pytest.fixture
def run(main_run: dict[str, Any]) -> dict[str, Any]:
    """One run of the digits recipe, finished."""
    return main_run


def raw_checkpoints(stack: RunningStack, run_id: str) -> dict[int, dict[str, torch.Tensor]]:
    """Every surviving checkpoint by step, read from the bucket by the test itself."""
    store = stack.store()
    log = RunLog(store, run_id, clock=SystemClock())
    log.refresh()
    return {
        entry.step: read_checkpoint(store.stream(entry.files["model.safetensors"].key)).tensors
        for entry in log.lineage
    }


def test_the_run_succeeds(run: dict[str, Any]) -> None:
    """The run ends `succeeded` at its last step, with its averages published."""
    assert run["state"] == "succeeded", run
    assert run["averaging_state"] == "published"
    assert run["step"] == run["total_steps"]


def test_the_downloaded_swa_is_the_exact_mean(stack: RunningStack, run: dict[str, Any], tmp_path: Path) -> None:
    """The download equals a float64 mean of the bucket's checkpoints within one float32 ulp, BatchNorm aside."""
    with stack.client() as client:
        path = client.download(run["run_id"], "swa", tmp_path / "swa.safetensors")
    checkpoints = raw_checkpoints(stack, run["run_id"])
    counted = [state for step, state in checkpoints.items() if step >= 100]
    assert len(counted) >= 5
    downloaded = load_file(path)
    for name, mean in exact_mean(counted).items():
        if "running_" not in name:
            ulp = float(np.spacing(np.float32(mean.abs().max())))
            assert float((downloaded[name].double() - mean).abs().max()) <= ulp, name


def test_the_weights_load_and_score_as_reported(stack: RunningStack, run: dict[str, Any], tmp_path: Path) -> None:
    """Both served files load with strict=True, hold the same weights, and score what the API says."""
    with stack.client() as client:
        safetensors = client.download(run["run_id"], "swa", tmp_path / "swa.safetensors")
        pickled = client.download(run["run_id"], "swa", tmp_path / "swa.pt", file="weights.pt")
        said = client.average(run["run_id"], "swa")["evaluation"]["averaged"]
    recipe = load_recipe(run["recipe"], run["config"], seed=0)
    model = recipe.build_model()
    model.load_state_dict(torch.load(pickled, weights_only=True), strict=True)
    assert recipe.evaluate(model, recipe.heldout_batches())["accuracy"] == pytest.approx(said["accuracy"])
    model.load_state_dict(load_file(safetensors), strict=True)
    assert recipe.evaluate(model, recipe.heldout_batches())["loss"] == pytest.approx(said["loss"], rel=1e-6)


def test_published_weights_can_be_asked(stack: RunningStack, run: dict[str, Any]) -> None:
    """The stack's own predictor tells held-out digits by the average, which its answer names."""
    images = load_digits().images[:20]
    with stack.client() as client:
        answer = client.predict(run["run_id"], "swa", [{"image": image.tolist()} for image in images])
        published = client.average(run["run_id"], "swa")
    told = [prediction["digit"] for prediction in answer["predictions"]]
    right = [digit == label for digit, label in zip(told, load_digits().target, strict=False)]
    assert sum(right) >= 18
    assert answer["generation"] == published["published_generation"]
    assert answer["sha256"] == published["weights"]["sha256"]


def test_averaging_helps(stack: RunningStack, run: dict[str, Any]) -> None:
    """SWA's or EMA's held-out loss beats the last raw iterate's, and both numbers and the verdict are reported."""
    with stack.client() as client:
        evaluations = [average["evaluation"] for average in client.averages(run["run_id"])]
    averaged = min(evaluation["averaged"]["loss"] for evaluation in evaluations)
    assert averaged < evaluations[0]["raw"]["loss"]
    for evaluation in evaluations:
        compared, difference = evaluation["comparison"], evaluation["averaged"]["loss"] - evaluation["raw"]["loss"]
        assert (compared["num_samples"], compared["difference"]) == (360, pytest.approx(difference))
        assert evaluation["won"] in {"averaged", "raw", "tie"}


def test_logs_metrics_and_events_tell_the_story(stack: RunningStack, run: dict[str, Any]) -> None:
    """The log begins with `submitted`, ends with `succeeded`; every step has its metric line."""
    with stack.client() as client:
        kinds = [event["kind"] for event in client.events(run["run_id"], limit=100)["data"]]
        steps, after = set(), None
        while page := client.metrics(run["run_id"], after=after)["data"]:
            steps |= {line["step"] for line in page}
            after = client.metrics(run["run_id"], after=after)["next"]
    assert (kinds[0], kinds[-2], kinds[-1]) == ("submitted", "training_finished", "succeeded")
    assert steps == set(range(1, run["total_steps"] + 1))
