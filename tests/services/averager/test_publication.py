"""The files that users download, against what was written when a model was still held in memory."""

from __future__ import annotations

import io
import json
import tracemalloc
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from services.averager.publication import Buffers, ServedWeights, provenance
from support.assessing import manifest
from support.averaging import same_bits
from wa_core.averaging.files.sources import open_source
from wa_core.records import BatchNormSummary
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from wa_core.averaging.files.sources import FilesSource

RECALIBRATED = BatchNormSummary(status="recalibrated")


def averaged() -> dict[str, torch.Tensor]:
    """Weights with what real ones have: several dtypes, a scalar, statistics, two names of one tensor."""
    generator = torch.Generator().manual_seed(0)
    embed = torch.randn(50, 4, generator=generator)
    return {
        "embed.weight": embed,
        "head.weight": embed,
        "half": torch.randn(7, generator=generator).half(),
        "brain": torch.randn(7, generator=generator).bfloat16(),
        "scale": torch.tensor(2.0),
        "bn.running_mean": torch.randn(4, generator=generator),
        "bn.running_var": torch.rand(4, generator=generator),
        "bn.num_batches_tracked": torch.tensor(3),
    }


@pytest.fixture
def value(tmp_path: Path) -> Iterator[FilesSource]:
    """The average's value, as the averager wrote it."""
    path = tmp_path / "swa.safetensors"
    path.write_bytes(serialize(averaged(), metadata={"anything": "else"}))
    source = open_source(path)
    yield source
    source.close()


def buffers_of(tensors: Mapping[str, torch.Tensor], value: FilesSource, folder: Path) -> Buffers | str:
    """What is made of these tensors from the assess process."""
    path = folder / "buffers.safetensors"
    path.write_bytes(serialize(tensors))
    return Buffers.read(path, value)


def test_a_served_file_has_the_bytes_of_one_written_at_once(value: FilesSource, tmp_path: Path) -> None:
    """Streamed with buffers put in place, it equals byte for byte what is serialised from memory."""
    new = {"bn.running_mean": torch.full((4,), 7.0), "bn.num_batches_tracked": torch.tensor(9)}
    buffers = buffers_of(new, value, tmp_path)
    assert isinstance(buffers, Buffers)
    metadata = provenance(manifest("swa"), RECALIBRATED, checkpoints={})
    served = ServedWeights(value, buffers)
    served.write_safetensors(tmp_path / "model.safetensors", metadata=metadata, on_block=lambda: None)
    served.write_archive(tmp_path / "model.pt", on_block=lambda: None)
    expected = averaged() | new
    at_once = serialize(expected, metadata=metadata, restore_ties=True)
    assert (tmp_path / "model.safetensors").read_bytes() == at_once
    assert same_bits(load_file(tmp_path / "model.safetensors"), expected)
    pickled = io.BytesIO()
    torch.save(expected, pickled)
    pickled.seek(0)
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    assert same_bits(loaded, torch.load(pickled, weights_only=True))
    assert loaded["embed.weight"].data_ptr() == loaded["head.weight"].data_ptr()


def test_statistics_with_two_names_are_replaced_under_both(tmp_path: Path) -> None:
    """A layer used twice has one set of statistics; whichever name they come back under, both get them."""
    shared = torch.zeros(3)
    (tmp_path / "v.safetensors").write_bytes(serialize({"a.running_mean": shared, "b.running_mean": shared}))
    value = open_source(tmp_path / "v.safetensors")
    buffers = buffers_of({"b.running_mean": torch.ones(3)}, value, tmp_path)
    assert isinstance(buffers, Buffers)
    ServedWeights(value, buffers).write_safetensors(tmp_path / "out", metadata={}, on_block=lambda: None)
    value.close()
    assert {name: tensor.tolist() for name, tensor in load_file(tmp_path / "out").items()} == {
        "a.running_mean": [1, 1, 1],
        "b.running_mean": [1, 1, 1],
    }


@pytest.mark.parametrize(
    ("forged", "message"),
    [
        ({"scale": torch.tensor(0.0)}, "'scale', which is no BatchNorm buffer"),
        ({"head.weight": torch.zeros(50, 4)}, "'head.weight', which is no BatchNorm buffer"),
        ({"other.running_mean": torch.zeros(4)}, "'other.running_mean', which is no BatchNorm buffer"),
        ({"bn.running_mean": torch.zeros(5)}, "'bn.running_mean', which is no BatchNorm buffer"),
        (
            {"bn.running_mean": torch.zeros(4, dtype=torch.float64)},
            "'bn.running_mean', which is no BatchNorm buffer",
        ),
        ({"bn.running_var": torch.full((4,), float("nan"))}, "'bn.running_var' that are not finite"),
    ],
)
def test_user_code_cannot_change_served_weights(
    forged: dict[str, torch.Tensor], message: str, value: FilesSource, tmp_path: Path
) -> None:
    """Only finite BatchNorm statistics that the average has, of the same shape and type, are taken back."""
    sound = {"bn.num_batches_tracked": torch.tensor(9)}
    refused = buffers_of(forged | sound, value, tmp_path)
    assert isinstance(refused, str)
    assert message in refused


def test_buffers_that_are_no_file_are_refused(value: FilesSource, tmp_path: Path) -> None:
    """A promised file that is absent or broken is user code at fault, not a crash."""
    (tmp_path / "broken").write_bytes(b"no tensors")
    for name in ("broken", "absent"):
        refused = Buffers.read(tmp_path / name, value)
        assert isinstance(refused, str)
        assert "no buffers that can be read" in refused


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Files of 64 MiB are written with less than 4 MiB at hand."""
    state = {f"layer.{number}": torch.full((4 << 20,), float(number)) for number in range(4)}
    (tmp_path / "v.safetensors").write_bytes(serialize(state))
    value = open_source(tmp_path / "v.safetensors")
    served = ServedWeights(value, Buffers({}))
    tracemalloc.start()
    served.write_safetensors(tmp_path / "out.safetensors", metadata={}, on_block=lambda: None)
    served.write_archive(tmp_path / "out.pt", on_block=lambda: None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    value.close()
    assert peak < 4 << 20
    assert same_bits(torch.load(tmp_path / "out.pt", weights_only=True), state)


def test_a_served_file_says_where_it_is_from() -> None:
    """Run, average, generation, rule, steps, coefficients, and the digests of the checkpoints that are known."""
    found = provenance(manifest("swa", generation=7), RECALIBRATED, checkpoints={20: "ab" * 32, 30: "cd" * 32})
    assert (found["run_id"], found["average"], found["generation"]) == (manifest("swa").run_id, "swa", "7")
    assert (found["rule"], found["n_averaged"], found["first_step"], found["last_step"]) == (
        "swa",
        "2",
        "10",
        "20",
    )
    assert json.loads(found["coefficients"]) == [[10, 0.5], [20, 0.5]]
    assert json.loads(found["sources"]) == [
        {"step": 10, "coefficient": 0.5},
        {"step": 20, "coefficient": 0.5, "sha256": {"model.safetensors": "ab" * 32}},
    ]
    assert (found["format"], found["weights"], found["batchnorm"]) == ("pt", "averaged", "recalibrated")
