"""Assessing in tasks of a real Ray, against the process beside the averager that does the same."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from services.averager.assessor import ProcessAssessor
from services.recipes.loader import load_recipe
from support.assessing import finish, make_job
from support.averaging import same_bits
from support.ray_nodes import RayNodes
from wa_core.records import RunRequest

if TYPE_CHECKING:
    from pathlib import Path

    from services.averager.assess_job import Assessed

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

REQUEST = RunRequest(recipe="services.recipes.digits:Digits", config={"width": 4, "batch_size": 128, "epochs": 1})


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Some of the recipe's."""
    recipe = load_recipe(REQUEST.recipe, REQUEST.config, seed=0)
    torch.manual_seed(seed)
    return {name: tensor.clone() for name, tensor in recipe.build_model().state_dict().items()}


def assessed(assessor: ProcessAssessor, folder: Path, *, seed: int = 1) -> tuple[Assessed, Assessed]:
    """Two averages beside raw weights."""
    averages = {"ema": weights(seed), "swa": weights(seed + 1)}
    assessor.start(make_job(folder, averages, raw=weights(seed + 2), request=REQUEST))
    one, other = finish(assessor).assessed
    return one, other


def told(one: Assessed) -> object:
    """An assessment, but for where and how long."""
    return one.assessment.model_copy(update={"where": "process", "took_s": 0.0})


def test_a_cluster_finds_what_a_process_finds_and_its_loss_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Ray metrics and served weights are bit for bit a process's; without a raylet one takes over."""
    with RayNodes(cpus_each=3) as nodes:
        for name, value in nodes.environment.items():
            monkeypatch.setenv(name, value)
        on_ray = [
            sys.executable,
            "-m",
            "services.averager.cluster",
            "--address",
            nodes.environment["WA_RAY_ADDRESS"],
        ]
        with ProcessAssessor() as here, ProcessAssessor(on_ray=on_ray) as there:
            expected, found = assessed(here, tmp_path), assessed(there, tmp_path)
            nodes.kill(0)
            after_all = assessed(there, tmp_path, seed=4)

    assert [one.assessment.where for one in (*expected, *found)] == ["process"] * 2 + ["ray"] * 2
    for mine, theirs in zip(expected, found, strict=True):
        assert told(mine) == told(theirs)
        assert mine.assessment.batchnorm.status == "recalibrated"
        served = [load_file(each.files["model.safetensors"]) for each in (mine, theirs)]
        assert same_bits(*served)
    assert [(one.assessment.where, one.assessment.batchnorm.status) for one in after_all] == [
        ("process", "recalibrated")
    ] * 2
