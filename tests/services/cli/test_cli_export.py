"""`wa export`: the real command and API, on published weights of the real digits recipe."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from services.recipes.loader import load_recipe
from support.api import serving
from support.predicting import PublishedRun, digits_weights
from support.runs import DIGITS
from wa_core.catalog.packages import put_package
from wa_core.packages import pack_folder
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.command import Wa

MOONS = "examples/moons"


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    """A bucket."""
    return MemoryStore()


@pytest.fixture(scope="module")
def run(store: MemoryStore) -> PublishedRun:
    """A published run of digits."""
    run = PublishedRun(store, config={"width": 4})
    run.publish(10, digits_weights(1))
    return run


@pytest.fixture(scope="module")
def address(store: MemoryStore) -> Iterator[str]:
    """The API."""
    with serving(store) as url:
        yield url


@pytest.fixture
def exporting(lonely_wa: Wa, address: str) -> Wa:
    """The command, pointed to the API."""
    return lonely_wa.with_variables(WA_API_URL=address)


def test_every_form_holds_the_same_averaged_model(exporting: Wa, run: PublishedRun, tmp_path: Path) -> None:
    """Safetensors, .pt, the folder, torch.export and ONNX agree on held-out images; names say `averaged`."""
    stem = f"swa-{run.run_id}-1.averaged"
    for file_format in ("safetensors", "pt", "hf", "pt2", "onnx"):
        done = exporting("export", run.run_id, "--format", file_format)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == (stem if file_format == "hf" else f"{stem}.{file_format}")

    weights = load_file(tmp_path / f"{stem}.safetensors")
    recipe = load_recipe(DIGITS, {"width": 4}, seed=0)
    model = recipe.build_model().eval()
    model.load_state_dict(weights)
    images = next(iter(recipe.heldout_batches()))[0]
    with torch.no_grad():
        expected = model(images)
    program = torch.export.load(tmp_path / f"{stem}.pt2").module()
    torch.testing.assert_close(program(images), expected, rtol=1e-5, atol=1e-5)
    session = onnxruntime.InferenceSession(tmp_path / f"{stem}.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(given), expected, rtol=1e-5, atol=1e-5)
    digest = hashlib.sha256((tmp_path / f"{stem}.safetensors").read_bytes()).hexdigest()
    assert session.get_modelmeta().custom_metadata_map["sha256"] == digest
    pickled = torch.load(tmp_path / f"{stem}.pt", weights_only=True)
    assert all(torch.equal(pickled[name], weights[name]) for name in weights)
    folder = tmp_path / stem
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == digest
    assert json.loads((folder / "config.json").read_text())["config"] == {"width": 4}
    assert digest in ModelCard.load(folder / "README.md").text


def test_a_recipe_of_a_package_needs_its_folder(exporting: Wa, store: MemoryStore) -> None:
    """Bad input 76: without it exit 2, and which option is missing; with it the model is exported."""
    moons = Path(__file__).parents[3] / MOONS
    run = PublishedRun(
        store, recipe="moons:Moons", config={"width": 8}, package=put_package(store, pack_folder(moons))
    )
    run.publish(10, load_recipe("moons:Moons", {"width": 8}, seed=0, code=moons).build_model().state_dict())

    without = exporting("export", run.run_id, "--format", "pt2", "-o", "moons.pt2")
    done = exporting("export", run.run_id, "--format", "pt2", "-o", "moons.pt2", "--package", str(moons))

    assert (without.returncode, "--package" in without.stderr) == (2, True)
    assert done.returncode == 0, done.stderr
    assert "not what the run was trained with" not in done.stderr
    assert torch.export.load(exporting.folder / "moons.pt2").module()(torch.zeros(3, 2)).shape == (3, 2)


def test_what_cannot_be_written_or_exported_says_so(exporting: Wa, run: PublishedRun, tmp_path: Path) -> None:
    """Bad inputs 76, 79: a folder that is not empty, a place that is not there, a state that is none."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()

    full = exporting("export", run.run_id, "--format", "hf", "-o", "full")
    nowhere = exporting("export", run.run_id, "--format", "onnx", "-o", "no/such/place.onnx")
    no_state = exporting("export", run.run_id, "--format", "pt", "--at", "yesterday")

    assert (full.returncode, "not empty" in full.stderr) == (2, True)
    assert (nowhere.returncode, "no/such/place.onnx" in nowhere.stderr) == (1, True)
    assert (no_state.returncode, "--at" in no_state.stderr) == (2, True)
