"""Exported programs against plain torch, on real held-out data, in batches of any size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnxruntime
import pytest
import torch

from services.exporter.conversion import ABOUT_FILE, export_onnx, export_program
from services.recipes.loader import load_recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from wa_core.recipe import Recipe

MOONS = Path(__file__).parents[3] / "examples" / "moons"
RECIPES = {
    "digits": ("services.recipes.digits:Digits", {"width": 4}, None),
    "char_lm": ("services.recipes.char_lm:CharLm", {"width": 16, "layers": 2}, None),
    "moons": ("moons:Moons", {"width": 8}, MOONS),
}


def recipe_and_model(name: str) -> tuple[Recipe, nn.Module]:
    """A recipe and a model that has seen data, so that its BatchNorm statistics are not those of a new one."""
    path, config, code = RECIPES[name]
    recipe = load_recipe(path, config, seed=0, code=code)
    torch.manual_seed(1)
    model = recipe.build_model().train()
    with torch.no_grad():
        for batch in recipe.calibration_batches():
            recipe.forward(model, batch)
    return recipe, model


def heldout(recipe: Recipe) -> Tensor:
    """What the model takes, of all held-out samples."""
    batches = list(recipe.heldout_batches())
    if isinstance(batches[0], torch.Tensor):
        return torch.cat([batch[:, :-1] for batch in batches])
    return torch.cat([batch[0] for batch in batches])


def check(recipe: Recipe, model: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
    """One sample, three, and all held-out ones give what plain torch gives in eval mode."""
    inputs = heldout(recipe)
    for part in (inputs[:1], inputs[:3], inputs):
        with torch.no_grad():
            torch.testing.assert_close(run(part), model.eval()(part), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_a_torch_program_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    """BatchNorm by its statistics, no dropout, tied weights; loads without the recipe and says what it is of."""
    recipe, model = recipe_and_model(name)
    inputs = recipe.example_inputs()
    assert inputs is not None
    export_program(model, inputs, tmp_path / "model.pt2", about='{"weights": "averaged"}')

    about = {ABOUT_FILE: ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=about).module()
    check(recipe, model, program)
    assert about[ABOUT_FILE] == '{"weights": "averaged"}'


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's exporter, of itself
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_onnx_model_computes_what_the_model_does(name: str, tmp_path: Path) -> None:
    """The same in onnxruntime; the file passes ONNX's own check and says what it is of."""
    recipe, model = recipe_and_model(name)
    inputs = recipe.example_inputs()
    assert inputs is not None
    path = tmp_path / "model.onnx"
    export_onnx(model, inputs, path, about={"weights": "averaged"})

    onnx.checker.check_model(onnx.load(path), full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    taken = session.get_inputs()[0].name
    check(recipe, model, lambda part: torch.from_numpy(session.run(None, {taken: part.numpy()})[0]))
    assert session.get_modelmeta().custom_metadata_map["weights"] == "averaged"
