"""`average_files` with paths alone: every format in, every format out, by their names."""

from __future__ import annotations

import json
import os
import pickle
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch.distributed import checkpoint as dcp

from wa_core import ShadowWeights, average_files
from wa_core.averaging.files.sources import open_object
from wa_core.errors import InvalidInputError, WeightAveragingError
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from pathlib import Path

STEPS = (10, 30)


def state(step: int) -> dict[str, torch.Tensor]:
    """Weights that say which step they are of."""
    return {"w": torch.full((4,), float(step)), "n": torch.tensor(step)}


def write(folder: Path, suffix: str) -> list[Path]:
    """Two checkpoints in one format."""
    paths = [folder / f"step_{step}{suffix}" for step in STEPS]
    for step, path in zip(STEPS, paths, strict=True):
        if suffix == ".safetensors":
            save_file(state(step), path)
        elif suffix:
            torch.save({"state_dict": state(step), "global_step": step}, path)
        else:
            path.mkdir()
            save_file(state(step), path / "model.safetensors")
            (path / "config.json").write_text(json.dumps({"step": step}))
    return paths


def read(out: Path) -> dict[str, torch.Tensor]:
    """Whatever an output's name says it is."""
    if out.suffix == ".pt":
        loaded: dict[str, torch.Tensor] = torch.load(out, weights_only=True)
        return loaded
    return load_file(out / "model.safetensors" if out.is_dir() else out)


@pytest.mark.parametrize(
    ("suffix", "out"),
    [
        (".safetensors", "average.safetensors"),
        (".safetensors", "average"),
        ("", "average"),
        (".ckpt", "average.pt"),
    ],
)
def test_every_format_goes_in_and_comes_out(tmp_path: Path, suffix: str, out: str) -> None:
    """Names decide, as in the command; what is left is the output alone."""
    paths = write(tmp_path, suffix)

    report = average_files(paths, "swa", tmp_path / out)

    found = read(tmp_path / out)
    assert torch.equal(found["w"], torch.full((4,), 20.0))
    assert found["n"].item() == 30
    assert report.coefficients == pytest.approx(dict.fromkeys(STEPS, 1 / 2))
    assert {path.name for path in tmp_path.iterdir()} == {*(path.name for path in paths), out}
    if not suffix:
        assert json.loads((tmp_path / out / "config.json").read_text()) == {"step": 30}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_folders_of_distributed_checkpoints_go_in(tmp_path: Path) -> None:
    """What torch.distributed.checkpoint wrote is a source like any other."""
    dcp.save({"model": state(20)}, checkpoint_id=tmp_path / "step_20", no_dist=True)
    average_files([tmp_path / "step_20"], "swa", tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["w"], torch.full((4,), 20.0))


def test_a_stored_object_has_no_neighbours_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that happens to lie in the working folder is not that of a checkpoint in a store."""
    store = MemoryStore()
    store.put("step_10.safetensors", save(state(10)))
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with closing(open_object(store, "step_10.safetensors", name="step_10.safetensors")) as source:
        average_files([source], "swa", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_one_path_is_one_checkpoint(tmp_path: Path) -> None:
    """A text is not taken letter by letter."""
    (path, *_) = write(tmp_path, ".safetensors")
    average_files(str(path), "swa", str(tmp_path / "out.safetensors"))
    assert torch.equal(load_file(tmp_path / "out.safetensors")["w"], state(10)["w"])


def test_paths_may_come_one_by_one(tmp_path: Path) -> None:
    """What a glob yields is taken as a list of it is."""
    write(tmp_path, ".safetensors")
    average_files(tmp_path.glob("step_*"), "swa", tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["w"], torch.full((4,), 20.0))


@pytest.mark.parametrize("dtype", ["float32", torch.float32, "float64", torch.float64])
def test_accumulators_are_named_as_in_torch_or_by_a_text(tmp_path: Path, dtype: Any) -> None:
    """Both spellings mean the same."""
    average_files(write(tmp_path, ".safetensors"), "swa", tmp_path / "out.safetensors", accumulator_dtype=dtype)
    assert torch.equal(load_file(tmp_path / "out.safetensors")["w"], torch.full((4,), 20.0))


def test_69_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    """A canary shows it; the refusal names the file, and nothing is left over."""

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "canary"),)

    bad, bare = tmp_path / "step_10.pt", tmp_path / "step_20.pt"
    torch.save({"state_dict": {"w": Hostile()}}, bad)
    bare.write_bytes(pickle.dumps(Hostile()))
    for path, code in [(bad, "unsafe_pickle"), (bare, "not_torch_archive")]:
        with pytest.raises(WeightAveragingError, match=path.name) as caught:
            average_files([path], "swa", tmp_path / "out.safetensors")
        assert caught.value.code == code
    assert sorted(tmp_path.iterdir()) == [bad, bare]


@pytest.mark.parametrize("out", ["out.safetensors", "out.pt", "out"])
def test_59_a_failure_leaves_nothing_behind(tmp_path: Path, out: str) -> None:
    """NaN in one of the sources is found while all are summed, whatever the output is."""
    paths = write(tmp_path, ".safetensors")
    save_file(state(30) | {"w": torch.tensor([1.0, 2.0, float("nan"), 3.0])}, paths[1])
    with pytest.raises(WeightAveragingError, match="step_30") as caught:
        average_files(paths, "swa", tmp_path / out)
    assert caught.value.code == "not_finite"
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize(
    ("out", "code", "says"),
    [
        ("nowhere/out.pt", "output_not_writable", "no folder"),
        ("out.zip", "invalid_input", "could be anything"),
        ("step_10.pt", "output", "is one of the checkpoints"),
        (".", "output", "is a folder"),
    ],
)
def test_79_an_output_that_cannot_be_is_refused_first(tmp_path: Path, out: str, code: str, says: str) -> None:
    """Before a source is so much as opened: here one is no checkpoint at all."""
    (tmp_path / "step_10.pt").write_bytes(b"no checkpoint")
    with pytest.raises(InvalidInputError, match=says) as caught:
        average_files([tmp_path / "step_10.pt"], "swa", tmp_path / out)
    assert caught.value.code == code


def test_an_output_inside_of_a_source_is_refused(tmp_path: Path) -> None:
    """A folder that is a checkpoint keeps its files: none of them is written over."""
    paths = write(tmp_path, "")
    with pytest.raises(InvalidInputError, match="or inside one"):
        average_files(paths, "swa", paths[0] / "model.safetensors")
    assert torch.equal(read(paths[0])["w"], state(10)["w"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, suffix: str) -> None:
    """A pipe that nobody writes to is refused at once."""
    os.mkfifo(tmp_path / f"step_10{suffix}")
    with pytest.raises(InvalidInputError, match="no file but a device, a pipe"):
        average_files([tmp_path / f"step_10{suffix}"], "swa", tmp_path / "out.safetensors")


def test_58_a_pointer_of_git_lfs_is_told_as_one(tmp_path: Path) -> None:
    """What a repository has instead of the file is named, with what fetches it."""
    path = tmp_path / "step_10.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12\n")
    with pytest.raises(WeightAveragingError, match="git lfs pull"):
        average_files([path], "swa", tmp_path / "out.safetensors")


@pytest.mark.parametrize("weights", [torch.nn.Linear(1, 1), [torch.ones(1)], {3: torch.ones(1)}])
def test_what_is_no_state_dict_is_refused_with_what_to_pass(weights: Any) -> None:
    """A module, a list and names that are no texts: the message says `model.state_dict()`."""
    with pytest.raises(InvalidInputError, match=r"pass model.state_dict\(\)"):
        ShadowWeights("swa").fold(weights, step=1)
