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

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]

MOONS = Path(__file__).parents[2] / "examples" / "moons"


CONFIG = {"epochs": 3}


@pytest.fixture(scope="module")
def run_ids(stack: RunningStack) -> tuple[str, str]:
    """Two runs of the package at once, which one worker each is enough for: a sound one and a misspelt one."""
    with stack.client() as client:
        package = client.upload_package(pack_folder(MOONS))["package"]
        own = {"recipe": "moons:Moons", "package": package}
        sound = {"checkpoint": {"every_steps": 8}, "averages": [{"name": "swa", "rule": "swa:start_step=16"}]}
        first = client.submit({**own, **sound, "config": CONFIG})
        return first["run_id"], client.submit({**own, "config": {"epoch": 3}})["run_id"]


def test_the_guides_recipe_ends_in_averaged_weights(
    stack: RunningStack, run_ids: tuple[str, str], tmp_path: Path
) -> None:
    """The recipe of the guide: what is downloaded loads into its model and scores what the API says."""
    with stack.client() as client:
        run = client.wait(run_ids[0])
        assert (run["state"], run["step"], run["total_steps"]) == ("succeeded", 48, 48), run
        path = client.download(run["run_id"], "swa", tmp_path / "swa.safetensors")
        evaluation = client.average(run["run_id"], "swa")["evaluation"]

    recipe = load_recipe("moons:Moons", CONFIG, seed=0, code=MOONS)
    model = recipe.build_model()
    model.load_state_dict(load_file(path), strict=True)
    assert recipe.evaluate(model, recipe.heldout_batches())["loss"] == pytest.approx(
        evaluation["averaged"]["loss"], rel=1e-6
    )
    assert evaluation["averaged"]["accuracy"] > 0.9


def test_a_config_that_the_recipe_refuses_fails_the_run_and_says_why(
    stack: RunningStack, run_ids: tuple[str, str]
) -> None:
    """What only the package's own code can know is refused where it runs, once, in plain words."""
    with stack.client() as client:
        run = client.wait(run_ids[1])

    assert (run["state"], run["attempt"], run["reason"]["code"]) == ("failed", 1, "invalid_config"), run
    assert "did you mean 'epochs'?" in run["reason"]["message"]
