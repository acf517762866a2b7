"""Parts of an assessment, put together again, against one process that does it all."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from services.averager import shards
from services.averager.measuring import Trial, data_digest, measure_weights, try_average
from services.averager.protocol import JobFile
from services.averager.shards import Part, Setting, in_line
from services.recipes.loader import load_recipe
from wa_core.packages import pack_folder
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from wa_core.recipe import Recipe

MOONS = Path(__file__).parents[3] / "examples" / "moons"
DIGITS = JobFile(
    recipe="services.recipes.digits:Digits",
    config={"width": 4, "batch_size": 128},
    seed=0,
    has_raw=True,
    averages=["swa"],
)
CHAR_LM = DIGITS.model_copy(update={"recipe": "services.recipes.char_lm:CharLm", "config": {}})


def built(job: JobFile) -> tuple[Recipe, dict[str, torch.Tensor]]:
    """A job's recipe, and weights for it."""
    recipe = load_recipe(job.recipe, job.config, seed=job.seed)
    torch.manual_seed(1)
    return recipe, {name: tensor.clone() for name, tensor in recipe.build_model().state_dict().items()}


def try_in_parts(job: JobFile, weights: dict[str, torch.Tensor], *, num_parts: int) -> Trial:
    """What the cluster does, without one."""
    setting, body = Setting(job, None), serialize(weights)
    parts = [Part(number, num_parts) for number in range(num_parts)]
    collected = in_line([shards.collect(setting, body, part) for part in parts])
    summary, buffers = shards.settle(setting, body, collected)
    values = [shards.values_of(setting, body, buffers, part) for part in parts]
    assert None not in values
    after = shards.measured_together(in_line([each for each in values if each is not None]))
    return Trial(shards.measure_before(setting, body), after, summary, buffers)


@pytest.mark.parametrize("num_parts", [1, 3, 40])
def test_parts_put_together_are_the_whole_to_the_last_bit(num_parts: int) -> None:
    """However many parts, more than batches too: statistics, metrics and values are those of one process."""
    recipe, weights = built(DIGITS)
    whole = try_average(recipe, recipe.build_model(), weights)

    parts = try_in_parts(DIGITS, weights, num_parts=num_parts)

    assert whole.batchnorm.num_layers > 0
    assert parts.batchnorm == whole.batchnorm
    assert parts.before == whole.before
    assert parts.buffers.keys() == whole.buffers.keys()
    assert all(torch.equal(parts.buffers[name], whole.buffers[name]) for name in whole.buffers)
    assert whole.after is not None
    assert parts.after is not None
    assert parts.after.metrics == whole.after.metrics
    assert (parts.after.values == whole.after.values).all()


def test_73_a_model_without_batchnorm_is_only_measured() -> None:
    """73: nothing to recalibrate is said as one process says it, and no buffer changes."""
    recipe, weights = built(CHAR_LM)
    setting, body = Setting(CHAR_LM, None), serialize(weights)
    del recipe

    summary, buffers = shards.settle(setting, body, shards.collect(setting, body, Part(0, 8)))

    assert (summary.status, summary.message, buffers) == ("skipped", "the model has no BatchNorm layers", {})


def test_raw_weights_and_data_are_measured_the_same() -> None:
    """Without new buffers the values are those of the weights as they are; the digest is that of all data."""
    recipe, weights = built(DIGITS)
    setting, body = Setting(DIGITS, None), serialize(weights)

    values = shards.values_of(setting, body, {}, Part(0, 1))

    assert values is not None
    assert (
        shards.measured_together(values).metrics == measure_weights(recipe, recipe.build_model(), weights).metrics
    )
    assert shards.digest(setting) == data_digest(recipe)


def test_a_package_is_there_for_a_part_and_gone_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipe gives what one process gives; afterwards neither its modules nor its files are left."""
    job = DIGITS.model_copy(update={"recipe": "moons:Moons", "config": {"epochs": 1}})
    setting = Setting(job, pack_folder(MOONS))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    paths = list(sys.path)
    digest = shards.digest(setting)

    assert "moons" not in sys.modules
    assert sys.path == paths
    assert list(tmp_path.iterdir()) == []
    assert digest == data_digest(load_recipe(job.recipe, job.config, seed=job.seed, code=MOONS))
