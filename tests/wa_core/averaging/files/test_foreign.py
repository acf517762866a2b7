"""Promises about torch's own formats: read by a limited child, and never trusted."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch
from torch.distributed import checkpoint as dcp

from support.descendants import descendants, is_alive
from support.hostile import Canary, archive
from support.patience import eventually
from wa_core.averaging.files.foreign import ConversionLimits, convert_checkpoint, export_pt, is_torch_format
from wa_core.averaging.files.sources import open_source
from wa_core.errors import CorruptError, IncompatibleError, InvalidInputError, WeightAveragingError
from wa_core.tensors import read_checkpoint, serialize

if TYPE_CHECKING:
    from pathlib import Path

    from wa_core.tensors import Checkpoint


def model_state() -> dict[str, torch.Tensor]:
    """Weights of several dtypes, one not contiguous, two tied."""
    torch.manual_seed(3)
    shared = torch.randn(5, 3)
    return {
        "embed.weight": shared,
        "head.weight": shared,
        "conv.weight": torch.randn(4, 6).T,
        "half.weight": torch.randn(7).to(torch.bfloat16),
        "norm.num_batches_tracked": torch.tensor(12),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
    }


def converted(source: Path) -> Checkpoint:
    """What the child made of `source`."""
    target = source.parent / "converted.safetensors"
    convert_checkpoint(source, target)
    return read_checkpoint([target.read_bytes()])


def assert_same(found: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    """Names, dtypes and values are the expected ones."""
    assert found.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name


def test_a_state_dict_comes_through_bit_for_bit_with_its_ties(tmp_path: Path) -> None:
    """Every dtype, layout and tie of a plain `.pt` is in the safetensors file that comes out."""
    state = model_state()
    torch.save(state, tmp_path / "model.pt")

    found = converted(tmp_path / "model.pt")

    assert_same(found, state)
    assert found.tensors["embed.weight"] is found.tensors["head.weight"]


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "module"])
def test_nested_weights_are_found_under_the_usual_keys(tmp_path: Path, key: str) -> None:
    """A training checkpoint gives its weights and its step; wrappers' prefixes go."""
    state = {f"module.{name}": tensor for name, tensor in model_state().items()}
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save({key: state, "optimizer": optimizer, "epoch": 3, "global_step": 700}, tmp_path / "last.ckpt")

    found = converted(tmp_path / "last.ckpt")

    assert_same(found, model_state())
    assert found.metadata["step"] == "700"


def test_weights_nested_twice_are_found(tmp_path: Path) -> None:
    """``{"model": {"state_dict": …}}`` is understood."""
    torch.save({"model": {"state_dict": model_state()}, "step": 8}, tmp_path / "m.pth")

    assert_same(converted(tmp_path / "m.pth"), model_state())


def test_two_places_for_weights_are_refused_by_name(tmp_path: Path) -> None:
    """Which of two state dicts is meant is not guessed."""
    torch.save({"model": model_state(), "state_dict": model_state()}, tmp_path / "m.pt")

    with pytest.raises(IncompatibleError, match="'state_dict' or 'model'") as refused:
        converted(tmp_path / "m.pt")

    assert refused.value.code == "several_weights"


def test_a_checkpoint_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    """The refusal names what is there instead, and what to save."""
    torch.save({"losses": [1.0, 2.0], "epoch": 3}, tmp_path / "m.pt")

    with pytest.raises(IncompatibleError, match=r"'losses' \(list\).*state_dict") as refused:
        converted(tmp_path / "m.pt")

    assert refused.value.code == "no_weights"


def test_69_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    """A pickle that would run a command is refused by name, and its canary is never made."""
    canary = tmp_path / "canary"
    archive(tmp_path / "evil.pt", pickle.dumps({"w": Canary(canary)}, protocol=2))

    with pytest.raises(CorruptError, match=r"posix\.system.*nothing of it was run") as refused:
        converted(tmp_path / "evil.pt")

    assert refused.value.code == "unsafe_pickle"
    assert not canary.exists()
    assert not (tmp_path / "converted.safetensors").exists()


def test_69_a_bare_pickle_named_pt_is_not_even_opened(tmp_path: Path) -> None:
    """What is no archive of `torch.save` is refused before anything is unpickled."""
    canary = tmp_path / "canary"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Canary(canary)))

    with pytest.raises(CorruptError, match="no archive") as refused:
        converted(tmp_path / "evil.pt")

    assert refused.value.code == "not_torch_archive"
    assert not canary.exists()


def test_57_a_pickle_named_safetensors_is_told_by_its_first_bytes(tmp_path: Path) -> None:
    """The header gate says that it is a pickle; nothing is unpickled."""
    canary = tmp_path / "canary"
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Canary(canary)))

    with pytest.raises(CorruptError, match="pickle") as refused:
        open_source(tmp_path / "model.safetensors")

    assert refused.value.code == "not_safetensors"
    assert not canary.exists()


def test_70_a_small_file_cannot_claim_a_huge_tensor(tmp_path: Path) -> None:
    """A stride-0 tensor of 64 GiB in under 2 kB is refused before a byte of it is made."""
    torch.save({"w": torch.zeros(1).expand(1 << 34)}, tmp_path / "bomb.pt")
    assert (tmp_path / "bomb.pt").stat().st_size < 2000

    with pytest.raises(CorruptError, match="68719476736 bytes") as refused:
        converted(tmp_path / "bomb.pt")

    assert refused.value.code == "expanded_tensor"


def test_a_small_expanded_tensor_is_no_bomb(tmp_path: Path) -> None:
    """Honest views of a few values are written out."""
    torch.save({"w": torch.ones(1).expand(1000)}, tmp_path / "m.pt")

    assert torch.equal(converted(tmp_path / "m.pt").tensors["w"], torch.ones(1000))


def test_71_a_deflate_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """A compressed archive is refused from its directory: torch.save never compresses."""
    archive(tmp_path / "bomb.pt", b"\0" * (256 << 20), compression=zipfile.ZIP_DEFLATED)

    with pytest.raises(CorruptError, match="compressed") as refused:
        converted(tmp_path / "bomb.pt")

    assert refused.value.code == "compressed_archive"


def test_a_conversion_over_its_limits_is_stopped(tmp_path: Path) -> None:
    """Memory over the limit ends the child, not this process, and leaves no file."""
    torch.save({"w": torch.zeros(1 << 21).reshape(1 << 10, -1).T}, tmp_path / "m.pt")
    limits = ConversionLimits(memory_bytes=1 << 20, file_bytes=1 << 30, seconds=60)

    with pytest.raises(CorruptError) as refused:
        convert_checkpoint(tmp_path / "m.pt", tmp_path / "out.safetensors", limits=limits)

    assert refused.value.code == "limit_exceeded"
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def test_the_child_sees_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the environment the child gets a short list of names, none of which holds a secret."""
    from wa_core.averaging.files.foreign import _environment

    monkeypatch.setenv("WA_S3_SECRET_KEY", "s3cret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret")

    assert "s3cret" not in " ".join(_environment().values())


def test_74_a_schedule_free_optimizer_in_train_mode_is_refused(tmp_path: Path) -> None:
    """Weights that the optimizer does not stand for are refused with what to call before saving."""
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1, "train_mode": True, "params": [0]}]}
    torch.save({"model": model_state(), "optimizer": optimizer}, tmp_path / "m.pt")

    with pytest.raises(IncompatibleError, match=r"optimizer\.eval\(\)") as refused:
        converted(tmp_path / "m.pt")

    assert refused.value.code == "schedule_free_train_mode"


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    """The file's name is in the message."""
    with pytest.raises(InvalidInputError, match=r"gone\.pt"):
        converted(tmp_path / "gone.pt")


@pytest.mark.parametrize("size", [0, 7, 300])
def test_a_damaged_archive_is_refused(tmp_path: Path, size: int) -> None:
    """A cut file is an error of the project, whatever torch makes of it."""
    torch.save(model_state(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:size])

    with pytest.raises(CorruptError):
        converted(tmp_path / "cut.pt")


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_dcp_folder_comes_through_bit_for_bit(tmp_path: Path, *, wrap: bool) -> None:
    """A folder of torch.distributed.checkpoint is read without a process group, optimizer left out."""
    state = {name: tensor.contiguous() for name, tensor in model_state().items() if name != "head.weight"}
    optimizer = {"state": {"0": {"exp_avg": torch.ones(3)}}}
    saved = {"model": state, "optim": optimizer, "step": 5} if wrap else state
    dcp.save(saved, checkpoint_id=tmp_path / "dcp", no_dist=True)

    assert is_torch_format(tmp_path / "dcp")
    assert_same(converted(tmp_path / "dcp"), state)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_69_a_hostile_dcp_index_runs_nothing(tmp_path: Path) -> None:
    """The index of a DCP folder is a pickle too; one that would run a command is refused."""
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    canary = tmp_path / "canary"
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Canary(canary)))

    with pytest.raises(CorruptError, match=r"posix\.system") as refused:
        converted(tmp_path / "dcp")

    assert refused.value.code == "unsafe_pickle"
    assert not canary.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_dcp_index_cannot_point_out_of_its_folder(tmp_path: Path) -> None:
    """A part outside of the folder is not read."""
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    index = tmp_path / "dcp" / ".metadata"
    # The same length, so that the pickle stays a pickle.
    index.write_bytes(index.read_bytes().replace(b"__0_0.distcp", b"../0_.distcp"))

    with pytest.raises(CorruptError, match="outside"):
        converted(tmp_path / "dcp")


def test_a_pt_file_written_here_loads_with_weights_only(tmp_path: Path) -> None:
    """`export_pt` keeps bits, dtypes and ties, and needs no trust to load."""
    state = model_state()
    (tmp_path / "m.safetensors").write_bytes(serialize(state))

    export_pt(tmp_path / "m.safetensors", tmp_path / "m.pt")

    found = torch.load(io.BytesIO((tmp_path / "m.pt").read_bytes()), weights_only=True)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()


def test_this_side_of_the_conversion_does_not_import_torch() -> None:
    """Only the child needs torch."""
    code = "import sys, wa_core.averaging.files.foreign; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_child_does_not_outlive_its_parent(tmp_path: Path) -> None:
    """A merge that is killed leaves no conversion running."""
    torch.save({"w": torch.zeros(1 << 20)}, tmp_path / "m.pt")
    code = (
        "import sys; from pathlib import Path; from wa_core.averaging.files.foreign import convert_checkpoint; "
        "convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    arguments = [str(tmp_path / "m.pt"), str(tmp_path / "out.safetensors")]
    parent = subprocess.Popen([sys.executable, "-c", code, *arguments])
    children = eventually(lambda: descendants(parent.pid), what="the conversion's start")

    parent.kill()
    parent.wait()

    eventually(lambda: not any(map(is_alive, children)), what="the conversion's end")
    assert not (tmp_path / "out.safetensors").exists()


def test_every_refusal_names_the_file(tmp_path: Path) -> None:
    """Among a hundred sources a person must see which one it was."""
    (tmp_path / "odd.ckpt").write_bytes(b"<html>")

    with pytest.raises(WeightAveragingError, match=r"odd\.ckpt"):
        converted(tmp_path / "odd.ckpt")
