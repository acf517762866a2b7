"""Promises about SOURCE: which files a folder, a pattern or a URL stands for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from services.cli.inputs import choose_checkpoints, find_checkpoints, natural_key
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["step_10.safetensors", "step_9.safetensors", "a.txt"], ["step_9.safetensors", "step_10.safetensors"]),
        (["model.safetensors", "optimizer.pt", "config.json"], ["model.safetensors"]),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
         ["model.safetensors.index.json"]),
        ([".metadata", "__0_0.distcp"], ["."]),
        (["pytorch_model.bin", "training_args.bin"], ["pytorch_model.bin"]),
        (["last.ckpt", "rng_state.pth", "optimizer.pt"], ["last.ckpt"]),
        (["checkpoint-100/model.safetensors", "checkpoint-20/model.safetensors", "checkpoint-20/trainer.pt"],
         ["checkpoint-20/model.safetensors", "checkpoint-100/model.safetensors"]),
        (["run/.metadata", "run/__0_0.distcp"], ["run/."]),
        ([".avg.safetensors.part/avg.safetensors", "readme.md"], []),
        ([], []),
    ],
)  # fmt: skip
def test_a_folder_stands_for_its_checkpoints(files: list[str], chosen: list[str]) -> None:
    """One model's folder is one checkpoint; others stand for all they hold, without optimizers and work files."""
    assert choose_checkpoints(files) == chosen


def test_numbers_sort_as_numbers() -> None:
    """step_100 comes before step_1000, whatever the alphabet says."""
    assert sorted(["s_1000", "s_100", "s_20"], key=natural_key) == ["s_20", "s_100", "s_1000"]


def test_patterns_leave_the_output_out(tmp_path: Path) -> None:
    """A pattern that matches the output of an earlier run does not average it in; naming it is refused."""
    for name in ("s_1.safetensors", "s_2.safetensors", "avg.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    output = tmp_path / "avg.safetensors"

    found = find_checkpoints([f"{tmp_path}/*.safetensors"], output=output)

    assert [one.name for one in found] == [f"{tmp_path}/s_1.safetensors", f"{tmp_path}/s_2.safetensors"]
    with pytest.raises(InvalidInputError, match="a source and the output"):
        find_checkpoints([str(output)], output=output)


@pytest.mark.parametrize(
    ("output", "made"),
    [
        ("avg.safetensors", ["avg.safetensors"]),
        ("avg.pt", ["avg.pt"]),
        ("avg", ["avg/model.safetensors", "avg/config.json"]),
        ("avg.safetensors", ["avg-00001-of-00002.safetensors", "avg-00002-of-00002.safetensors"]),
    ],
)
def test_a_folder_leaves_the_output_of_an_earlier_try_out(tmp_path: Path, output: str, made: list[str]) -> None:
    """The same command given twice averages the same checkpoints, in whatever format it writes beside them."""
    made = [*made, "avg.safetensors.index.json"] if len(made) > 1 and "." in output else made
    for name in ("s_1.safetensors", "s_2.safetensors", *made):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    for text in (str(tmp_path), f"{tmp_path}/*"):
        found = find_checkpoints([text], output=tmp_path / output)
        assert [one.name for one in found] == [f"{tmp_path}/s_1.safetensors", f"{tmp_path}/s_2.safetensors"]


def test_shards_in_a_pattern_are_one_checkpoint(tmp_path: Path) -> None:
    """A pattern that matches the parts of a checkpoint finds its index; without an index it says so."""
    for name in ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.safetensors.index.json"):
        (tmp_path / name).write_bytes(b"x")
    pattern = f"{tmp_path}/m-*.safetensors"

    assert [one.name for one in find_checkpoints([pattern], output=None)] == [
        f"{tmp_path}/m.safetensors.index.json"
    ]

    (tmp_path / "m.safetensors.index.json").unlink()
    with pytest.raises(InvalidInputError, match=r"index .*m\.safetensors\.index\.json is missing"):
        find_checkpoints([pattern], output=None)


def test_a_source_has_a_new_stamp_when_it_changes(tmp_path: Path) -> None:
    """An interrupted merge must see that a file is another one now."""
    path = tmp_path / "s_1.safetensors"
    path.write_bytes(b"x")
    (before,) = find_checkpoints([str(path)], output=None)

    os.utime(path, ns=(1, 1))

    (after,) = find_checkpoints([str(path)], output=None)
    assert before.stamp != after.stamp


@pytest.mark.parametrize("text", ["gone.safetensors", "gone*", "empty"])
def test_a_text_that_stands_for_nothing_is_named(tmp_path: Path, text: str) -> None:
    """The error holds the text as it was typed."""
    (tmp_path / "empty").mkdir()

    with pytest.raises(InvalidInputError, match=text.replace("*", r"\*")):
        find_checkpoints([f"{tmp_path}/{text}"], output=None)
