"""The assess child process, for real: what it measures, what it may not do, and what its death costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from services.averager import assess
from services.averager.assessor import ProcessAssessor, _outcome, environment_without_secrets
from services.recipes.loader import load_recipe
from support.averaging import same_bits
from support.runs import DIGITS
from wa_core.errors import UserCodeError
from wa_core.recipe import Recipe
from wa_core.records import RunRequest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REQUEST = RunRequest(recipe=DIGITS, config={"width": 4})


def digits_weights() -> dict[str, torch.Tensor]:
    """Initial weights of a narrow digits net; its BatchNorm statistics fit nothing."""
    torch.manual_seed(0)
    return load_recipe(DIGITS, {"width": 4}, seed=0).build_model().state_dict()


@pytest.fixture
def assessor() -> Iterator[ProcessAssessor]:
    """A real assessor, ended with its child."""
    with ProcessAssessor() as found:
        yield found


def test_measures_raw_and_averaged_and_recalibrates(assessor: ProcessAssessor) -> None:
    """Held-out metrics for raw and for the average before and after; only BatchNorm buffers come back."""
    weights = digits_weights()
    outcome = assessor.assess(REQUEST, raw=weights, weights={"swa": weights})["swa"]
    assert outcome.batchnorm.status == "recalibrated"
    assert outcome.batchnorm.num_samples == 1437
    assert outcome.raw == outcome.before
    assert outcome.after is not None
    assert outcome.after["loss"] != outcome.raw["loss"]
    assert outcome.buffers
    assert all("running_" in name or "num_batches_tracked" in name for name in outcome.buffers)


def test_averages_of_one_job_get_their_own_buffers(assessor: ProcessAssessor) -> None:
    """Measured together or alone, an average gets the same recalibrated buffers and score."""
    weights = digits_weights()
    other = {name: tensor * 0.5 if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    together = assessor.assess(REQUEST, raw=None, weights={"swa": weights, "ema": other})
    alone = assessor.assess(REQUEST, raw=None, weights={"swa": weights})
    assert same_bits(together["swa"].buffers, alone["swa"].buffers)
    assert together["swa"].after == alone["swa"].after
    assert not same_bits(together["swa"].buffers, together["ema"].buffers)


def test_one_child_serves_many_jobs_and_a_dead_one_is_replaced(assessor: ProcessAssessor) -> None:
    """The child stays between jobs; killed with SIGKILL it is started anew and nothing else is lost."""
    weights = digits_weights()
    first = assessor.assess(REQUEST, raw=None, weights={"swa": weights})["swa"]
    assert assessor._child is not None
    pid = assessor._child.pid
    again = assessor.assess(REQUEST, raw=None, weights={"swa": weights})["swa"]
    assert assessor._child.pid == pid
    os.kill(pid, signal.SIGKILL)
    assessor._child.wait()
    replaced = assessor.assess(REQUEST, raw=None, weights={"swa": weights})["swa"]
    assert first.after == again.after == replaced.after


def test_weights_that_do_not_fit_the_recipe_are_an_outcome(assessor: ProcessAssessor) -> None:
    """A recipe that cannot load the weights yields `assess_failed`, with the reason, for every average."""
    outcome = assessor.assess(REQUEST, raw=None, weights={"swa": {"strange": torch.ones(2)}})["swa"]
    assert (outcome.batchnorm.status, outcome.batchnorm.code) == ("failed", "assess_failed")
    assert "strange" in outcome.batchnorm.message


def test_a_hanging_child_is_killed() -> None:
    """Past the time limit the child is killed and the outcome says so."""
    with ProcessAssessor(time_limit_s=0.01) as assessor:
        outcome = assessor.assess(REQUEST, raw=None, weights={"swa": digits_weights()})["swa"]
        assert "longer than 0.01 s" in outcome.batchnorm.message
        assert assessor._child is None


def test_user_code_gets_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither store keys nor tokens are in the child's environment."""
    for name in ("WA_S3_SECRET_KEY", "WA_TOKEN", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "secret")
    assert "secret" not in environment_without_secrets().values()


def test_what_a_recipe_prints_cannot_pass_for_an_answer() -> None:
    """The child's stdout carries answers alone; a broken job is answered, and the child lives on."""
    child = subprocess.run(
        [sys.executable, "-m", "services.averager.assess"],
        input=b'{"folder": "/nowhere"}\n{"folder": "/nowhere"}\n',
        capture_output=True,
        check=True,
        timeout=120,
    )
    answers = [json.loads(line) for line in child.stdout.splitlines()]
    assert [list(answer) for answer in answers] == [["error"], ["error"]]


class Plain(Recipe):
    """A recipe around one given model, for what the built-in ones do not show."""

    def __init__(self, model: nn.Module, *, num_calibration: int) -> None:
        self._model = model
        self._num_calibration = num_calibration

    num_train_samples = 0

    def build_model(self) -> nn.Module:
        """The given model."""
        return self._model

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Never trained."""
        raise AssertionError

    def train_batch(self, indices: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
        """Never trained."""
        raise AssertionError

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """Never trained."""
        raise AssertionError

    def forward(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """Run the model."""
        result: torch.Tensor = model(batch)
        return result

    def calibration_batches(self) -> list[torch.Tensor]:
        """As many batches as asked for."""
        return [torch.randn(8, 3) for _ in range(self._num_calibration)]

    def heldout_batches(self) -> list[torch.Tensor]:
        """One batch."""
        return [torch.ones(4, 3)]

    def evaluate(self, model: nn.Module, batches: object) -> dict[str, float]:
        """A constant."""
        return {"loss": 1.0}


def test_72_empty_calibration_data_is_an_answer() -> None:
    """72: `calibration_failed` with the weights measured as they are, and no buffers to serve."""
    recipe = Plain(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), num_calibration=0)
    found = assess.assess_average(recipe, recipe.build_model(), recipe.build_model().state_dict())
    assert (found["batchnorm"].status, found["batchnorm"].code) == ("failed", "calibration_failed")
    assert (found["before"], found["after"], found["buffers"]) == ({"loss": 1.0}, None, {})


def test_calibration_that_fails_for_one_average_is_an_answer() -> None:
    """Weights whose activations are NaN get `calibration_failed`; the job goes on to the next average."""
    recipe = Plain(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), num_calibration=2)
    weights = {name: tensor.clone() for name, tensor in recipe.build_model().state_dict().items()}
    broken = weights | {"0.bias": torch.full((3,), float("nan"))}
    found = assess.run_job(recipe, raw=None, averages={"broken": broken, "sound": weights})["averages"]
    assert found["broken"]["batchnorm"].code == "calibration_failed"
    assert found["sound"]["batchnorm"].status == "recalibrated"


def test_73_a_model_without_batchnorm_skips_recalibration() -> None:
    """73: recalibration is skipped and the report says so; the average is measured all the same."""
    recipe = Plain(nn.Linear(3, 3), num_calibration=2)
    found = assess.assess_average(recipe, recipe.build_model(), recipe.build_model().state_dict())
    assert found["batchnorm"].status == "skipped"
    assert "no BatchNorm" in found["batchnorm"].message
    assert found["after"] == {"loss": 1.0}


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"raw": None, "averages": {"swa": 7}},
        {"raw": {"loss": "low"}, "averages": {"swa": {"batchnorm": {"status": "skipped"}, "buffers": None}}},
        {"raw": None, "averages": {"swa": {"batchnorm": {"status": "skipped"}, "buffers": "gone.safetensors"}}},
    ],
)
def test_an_answer_of_the_wrong_form_is_user_code_at_fault(answer: dict[str, object], tmp_path: Path) -> None:
    """What the child says is believed only as far as it has the right form; the averager never stumbles."""
    with pytest.raises(UserCodeError, match="nonsense"):
        _outcome(tmp_path, answer, "swa", took_s=0.0)
