"""The assess child process: recalibrates BatchNorm and measures weights on held-out data.

It runs user code (a recipe), so it is a process of its own: without credentials, killable, and able to change
nothing but the BatchNorm buffers it hands back. It reads one JSON job a line on stdin and answers one JSON line
on stdout; tensors travel as safetensors files in the job's folder. It ends when stdin does.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from services.recipes.loader import load_recipe
from wa_core.batchnorm import recalibrate
from wa_core.errors import InvalidInputError
from wa_core.records import BatchNormSummary
from wa_core.tensors import read_checkpoint, serialize

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wa_core.recipe import Recipe

NICENESS = 10


def main() -> int:
    """Serve jobs until stdin ends."""
    os.nice(NICENESS)  # measuring must not slow the trainer down
    torch.set_num_threads(1)
    answers = _take_stdout()
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()
    return 0


def run_job(
    recipe: Recipe, *, raw: dict[str, Tensor] | None, averages: dict[str, dict[str, Tensor]]
) -> dict[str, Any]:
    """Measure `raw` and every average; returns metrics, reports and the recalibrated buffers by average."""
    model = recipe.build_model()
    return {
        "raw": None if raw is None else measure(recipe, model, raw),
        "averages": {name: assess_average(recipe, model, weights) for name, weights in averages.items()},
    }


def measure(recipe: Recipe, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, float]:
    """Held-out metrics of `weights` as they are."""
    model.load_state_dict(weights, strict=True)
    return recipe.evaluate(model, recipe.heldout_batches())


def assess_average(recipe: Recipe, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Measure an average before and after recalibration.

    Calibration data that will not do is an answer, not a crash: this average keeps the statistics it came with,
    and the others of the job are not held up.
    """
    before = measure(recipe, model, weights)
    try:
        report = recalibrate(model, recipe.calibration_batches(), forward=recipe.forward)
    except InvalidInputError as error:
        summary = BatchNormSummary(status="failed", code=error.code, message=error.message)
        return {"before": before, "after": None, "batchnorm": summary, "buffers": {}}
    summary = BatchNormSummary(
        status="skipped" if report.skipped else "recalibrated",
        num_layers=report.num_layers,
        num_batches=report.num_batches,
        num_samples=report.num_samples,
        message="the model has no BatchNorm layers" if report.skipped else "",
    )
    after = recipe.evaluate(model, recipe.heldout_batches())
    return {"before": before, "after": after, "batchnorm": summary, "buffers": _changed(model, weights)}


def _changed(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the buffers that recalibration has changed; the model goes on to the next average."""
    buffers = dict(model.named_buffers())
    return {name: buffer.clone() for name, buffer in buffers.items() if not torch.equal(buffer, weights[name])}


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    try:
        return _answer_sound(job)
    except Exception as error:  # noqa: BLE001  user code may raise anything; the parent records it and folding goes on
        return {"error": f"{type(error).__name__}: {error}"}


def _answer_sound(job: dict[str, Any]) -> dict[str, Any]:
    folder = Path(job["folder"])
    recipe = load_recipe(job["recipe"], job["config"], seed=job["seed"])
    raw = _read(folder / job["raw"]) if job["raw"] else None
    outcome = run_job(
        recipe, raw=raw, averages={name: _read(folder / file) for name, file in job["averages"].items()}
    )
    for number, found in enumerate(outcome["averages"].values()):
        buffers, found["buffers"] = found["buffers"], None
        found["batchnorm"] = found["batchnorm"].model_dump()
        if buffers:
            found["buffers"] = f"buffers-{number}.safetensors"
            (folder / found["buffers"]).write_bytes(serialize(buffers))
    return outcome


def _read(path: Path) -> dict[str, Tensor]:
    return read_checkpoint([path.read_bytes()]).tensors


def _take_stdout() -> Any:  # noqa: ANN401  a text stream
    """Keep stdout for answers, and send what user code prints to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    sys.exit(main())
