"""Promises about outputs: formats, shards, ties, atomicity, and going on after a kill."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from wa_core.averaging.files.casting import CastingWriter
from wa_core.averaging.files.offline import average_files
from wa_core.averaging.files.sources import FilesSource, open_source
from wa_core.averaging.files.staging import Staging
from wa_core.averaging.files.writers import StagedWriter, find_companions
from wa_core.averaging.rules import SwaRule
from wa_core.errors import ConflictError, InvalidInputError
from wa_core.tensors import read_checkpoint, serialize

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from wa_core.averaging.files.writers import OutputFormat

STEPS = (10, 20, 30)


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """Three checkpoints with a tied tensor."""
    paths = []
    for step in STEPS:
        path = tmp_path / f"step_{step}.safetensors"
        path.write_bytes(serialize(state(step)))
        paths.append(path)
    return paths


def state(step: int) -> dict[str, Tensor]:
    """Weights of one step."""
    generator = torch.Generator().manual_seed(step)
    embedding = torch.randn(64, 8, generator=generator)
    return {
        "embed.weight": embedding,
        "head.weight": embedding,
        "a.weight": torch.randn(32, 16, generator=generator),
        "b.weight": torch.randn(100, generator=generator),
        "count": torch.tensor(step),
    }


def expected() -> dict[str, Tensor]:
    """The mean of all, by torch in float64."""
    states = [state(step) for step in STEPS]
    means = {
        name: torch.stack([one[name].double() for one in states]).mean(0).float()
        for name in states[0]
        if name != "count"
    }
    return means | {"count": torch.tensor(STEPS[-1])}


def written(
    sources: list[Path], output: Path, file_format: OutputFormat, *, max_shard_bytes: int | None = None
) -> tuple[Path, ...]:
    """Average `sources` to `output`."""
    staging = Staging(output, job=["test"])
    writer = StagedWriter(
        staging,
        file_format=file_format,
        max_shard_bytes=max_shard_bytes,
        companions=find_companions(sources[0].parent),
    )
    return average_files([str(path) for path in sources], SwaRule(), writer).files


def assert_averaged(found: Mapping[str, Tensor], names: set[str] | None = None) -> None:
    """All tensors, or those named, are the mean."""
    wanted = {name: tensor for name, tensor in expected().items() if names is None or name in names}
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_one_file_loads_without_knowing_of_ties(tmp_path: Path, sources: list[Path]) -> None:
    """A plain reader finds every name of the model, tied ones included, and nothing is left beside the file."""
    output = tmp_path / "avg.safetensors"

    files = written(sources, output, "safetensors")

    found = read_checkpoint([output.read_bytes()])
    assert files == (output,)
    assert "tied" not in found.metadata
    assert found.metadata["rule"] == "swa"
    assert_averaged(found.tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(path.name for path in sources), output.name]
    )


def test_a_large_file_is_cut_and_indexed(tmp_path: Path, sources: list[Path]) -> None:
    """Shards are named as Hugging Face names them, none is larger than asked, and the index finds every tensor."""
    files = written(sources, tmp_path / "avg.safetensors", "safetensors", max_shard_bytes=2100)

    index = tmp_path / "avg.safetensors.index.json"
    shards = files[:-1]
    assert files[-1] == index
    assert [path.name for path in shards] == [
        f"avg-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    weight_map = json.loads(index.read_text())["weight_map"]
    found: dict[str, Tensor] = {}
    for shard in shards:
        tensors = read_checkpoint([shard.read_bytes()]).tensors
        assert {weight_map[name] for name in tensors} == {shard.name}
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 2100
        found |= tensors
    assert_averaged(found)


def test_a_cut_average_is_itself_a_source(tmp_path: Path, sources: list[Path]) -> None:
    """What was written in shards can be averaged again."""
    written(sources, tmp_path / "avg", "hf", max_shard_bytes=2100)

    source = open_source(tmp_path / "avg")

    assert isinstance(source, FilesSource)
    assert source.ties == {"head.weight": "embed.weight"}
    source.close()


def test_a_pt_file_loads_with_weights_only(tmp_path: Path, sources: list[Path]) -> None:
    """The `.pt` output is a plain state dict whose tied tensors share memory."""
    written(sources, tmp_path / "avg.pt", "pt", max_shard_bytes=100)

    found = torch.load(tmp_path / "avg.pt", weights_only=True)
    assert_averaged(found)
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()


def test_a_hugging_face_folder_has_what_loading_needs(tmp_path: Path, sources: list[Path]) -> None:
    """Configuration and tokenizer come along; other files do not."""
    for name in ("config.json", "tokenizer.json", "tokenizer.model", "notes.txt"):
        (tmp_path / name).write_text(name)

    written(sources, tmp_path / "avg", "hf")

    assert sorted(path.name for path in (tmp_path / "avg").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    ]
    found = read_checkpoint([(tmp_path / "avg" / "model.safetensors").read_bytes()])
    assert_averaged(found.tensors)
    assert found.metadata["format"] == "pt"


def test_a_folder_is_never_mixed_with_an_older_one(tmp_path: Path, sources: list[Path]) -> None:
    """A folder that holds something already is left alone."""
    (tmp_path / "avg").mkdir()
    (tmp_path / "avg" / "model.safetensors").write_text("old")

    with pytest.raises(InvalidInputError, match="not empty"):
        written(sources, tmp_path / "avg", "hf")

    assert (tmp_path / "avg" / "model.safetensors").read_text() == "old"


def test_a_failure_leaves_the_old_output(tmp_path: Path, sources: list[Path]) -> None:
    """A source with NaN stops the merge, and the file that was there stays as it was."""
    bad = state(20)
    bad["b.weight"][3] = float("nan")
    sources[1].write_bytes(serialize(bad))
    output = tmp_path / "avg.safetensors"
    output.write_text("old")

    with pytest.raises(Exception, match="NaN"):
        written(sources, output, "safetensors")

    assert output.read_text() == "old"


def test_other_dtypes_are_written_for_averaged_tensors_only(tmp_path: Path, sources: list[Path]) -> None:
    """Casting rounds what was averaged and leaves counters alone."""
    staging = Staging(tmp_path / "avg.safetensors", job=[])
    averaged = {"embed.weight", "a.weight", "b.weight"}
    writer = CastingWriter(StagedWriter(staging, file_format="safetensors"), dtype="BF16", averaged=averaged)

    average_files([str(path) for path in sources], SwaRule(), writer)

    found = read_checkpoint([(tmp_path / "avg.safetensors").read_bytes()]).tensors
    assert found["count"].dtype == torch.int64
    for name in averaged:
        assert found[name].dtype == torch.bfloat16
        torch.testing.assert_close(found[name], expected()[name].bfloat16(), rtol=2**-7, atol=1e-6)


def test_only_one_process_works_on_an_output(tmp_path: Path) -> None:
    """A second merge into the same name is refused while the first is at work."""
    first = Staging(tmp_path / "avg.safetensors", job=[])

    with pytest.raises(ConflictError, match=r"avg\.safetensors"):
        Staging(tmp_path / "avg.safetensors", job=[])

    first.remove()


def test_what_was_recorded_is_known_to_the_same_job_only(tmp_path: Path) -> None:
    """A merge goes on from noted bytes of its own job, and from none of another."""
    output = tmp_path / "avg.safetensors"
    first = Staging(output, job=["one"])
    first.note("w", 0, 10)
    first.close()

    again = Staging(output, job=["one"])
    assert again.is_resumed
    assert again.has("w", 2, 10)
    assert not again.has("w", 2, 11)
    again.close()

    other = Staging(output, job=["two"])
    assert not other.is_resumed
    other.remove()
    assert list(tmp_path.iterdir()) == []


def test_work_from_before_a_power_cut_does_not_count(tmp_path: Path) -> None:
    """What was noted before the machine started anew may never have reached the disk; it is thrown away."""
    output = tmp_path / "avg.safetensors"
    first = Staging(output, job=["one"], boot="monday")
    first.note("w", 0, 10)
    first.close()

    again = Staging(output, job=["one"], boot="tuesday")

    assert not again.is_resumed
    assert [path.name for path in again.folder.iterdir()] == ["job.json"]
    again.remove()


@pytest.mark.parametrize(("name", "max_shard_bytes"), [("avg.safetensors", None), ("avg.safetensors", 2100)])
def test_the_disk_has_a_file_before_its_name_changes(
    tmp_path: Path, sources: list[Path], name: str, max_shard_bytes: int | None
) -> None:
    """With `sync`, every part is waited for under its temporary name, and the folder at the end."""
    output, seen = tmp_path / name, []

    def sync(path: Path) -> None:
        seen.append(path)
        if path != tmp_path:
            assert path.is_relative_to(tmp_path / f".{name}.part")
            assert path.stat().st_size > 0

    writer = StagedWriter(
        Staging(output, job=[]), file_format="safetensors", max_shard_bytes=max_shard_bytes, sync=sync
    )
    files = average_files([str(path) for path in sources], SwaRule(), writer).files

    assert len([path for path in seen if path != tmp_path]) == len(files)
    assert seen[-1] == tmp_path


def test_the_disk_has_a_whole_folder_before_it_is_there(tmp_path: Path, sources: list[Path]) -> None:
    """A Hugging Face folder is waited for with all its files while it has another name."""
    (tmp_path / "config.json").write_text("{}")
    output, seen = tmp_path / "avg", []

    def sync(path: Path) -> None:
        seen.append(path.name)
        assert output.exists() == (path == tmp_path)

    writer = StagedWriter(
        Staging(output, job=[]), file_format="hf", companions=[tmp_path / "config.json"], sync=sync
    )
    average_files([str(path) for path in sources], SwaRule(), writer)

    assert sorted(seen[:2]) == ["config.json", "model.safetensors"]
    assert seen[2:] == ["made", tmp_path.name]


def test_a_journal_line_cut_by_a_kill_does_not_count(tmp_path: Path) -> None:
    """Only whole lines of the journal say that bytes are there."""
    output = tmp_path / "avg.safetensors"
    first = Staging(output, job=[])
    (first.folder / "journal.jsonl").write_text('["w", 0, 10]\n["w", 10, 2')
    first.close()

    again = Staging(output, job=[])

    assert again.has("w", 0, 10)
    assert not again.has("w", 10, 20)
    again.note("w", 20, 30)
    again.note("w", 30, 40)
    again.close()
    third = Staging(output, job=[])
    assert third.has("w", 0, 10)
    third.remove()


def test_noted_bytes_do_not_count_when_their_file_is_gone(tmp_path: Path, sources: list[Path]) -> None:
    """A journal whose data file has been moved into place or removed is not believed."""
    output = tmp_path / "avg.safetensors"
    staging = Staging(output, job=["test"])
    (staging.folder / "journal.jsonl").write_text('["b.weight", 0, 400]\n["embed.weight", 0, 2048]\n')
    staging.close()

    written(sources, output, "safetensors")

    assert_averaged(read_checkpoint([output.read_bytes()]).tensors)


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    """Nothing is read for an output whose folder does not exist."""
    with pytest.raises(InvalidInputError, match="cannot be written") as refused:
        Staging(tmp_path / "none" / "avg.safetensors", job=[])

    assert refused.value.code == "output_not_writable"
