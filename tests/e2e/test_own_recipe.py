"""A recipe of one's own, sent as a package: trained by Ray workers, assessed by a child, downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file

from services.recipes.loader import load_recipe
from wa_core.packages import pack_folder

if TYPE_CHECKING:
    from support.stack import RunningStack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]

MOONS = Path(__file__).parents[2] / "examples" / "moons"


def test_the_guides_recipe_ends_in_averaged_weights(stack: RunningStack, tmp_path: Path) -> None:
    """The recipe of the guide: what is downloaded loads into its model and scores what the API says."""
    config = {"epochs": 3}
    with stack.client() as client:
        package = client.upload_package(pack_folder(MOONS))["package"]
        submitted = client.submit(
            {
                "recipe": "moons:Moons",
                "package": package,
                "config": config,
                "scaling": {"num_workers": 2},
                "checkpoint": {"every_steps": 8},
                "averages": [{"name": "swa", "rule": "swa:start_step=16"}],
            }
        )
        run = client.wait(submitted["run_id"])
        assert (run["state"], run["step"], run["total_steps"]) == ("succeeded", 48, 48), run
        path = client.download(run["run_id"], "swa", tmp_path / "swa.safetensors")
        evaluation = client.average(run["run_id"], "swa")["evaluation"]

    recipe = load_recipe("moons:Moons", config, seed=0, code=MOONS)
    model = recipe.build_model()
    model.load_state_dict(load_file(path), strict=True)
    assert recipe.evaluate(model, recipe.heldout_batches())["loss"] == pytest.approx(
        evaluation["averaged"]["loss"], rel=1e-6
    )
    assert evaluation["averaged"]["accuracy"] > 0.9


def test_a_config_that_the_recipe_refuses_fails_the_run_and_says_why(stack: RunningStack) -> None:
    """What only the package's own code can know is refused where it runs, once, in plain words."""
    with stack.client() as client:
        package = client.upload_package(pack_folder(MOONS))["package"]
        request = {"recipe": "moons:Moons", "package": package, "config": {"epoch": 3}}
        run = client.wait(client.submit(request)["run_id"])

    assert (run["state"], run["attempt"], run["reason"]["code"]) == ("failed", 1, "invalid_config"), run
    assert "did you mean 'epochs'?" in run["reason"]["message"]
