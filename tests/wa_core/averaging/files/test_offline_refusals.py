"""What the offline merge refuses, by name and before anything is visible."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from support.bad_files import BAD_FILES
from support.checkpoints import network, save
from wa_core.averaging.files.offline import MergeOptions, average_files
from wa_core.averaging.files.sources import open_source
from wa_core.averaging.rules import parse_rule
from wa_core.errors import (
    CorruptError,
    IncompatibleError,
    InvalidInputError,
    WeightAveragingError,
)
from wa_core.tensors import read_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


SWA = parse_rule("swa")


def refused(folder: Path, paths: list[Path], code: str, **how: Any) -> WeightAveragingError:
    """The error of a merge that must leave no trace."""
    before = sorted(folder.iterdir())
    with pytest.raises(WeightAveragingError) as caught:
        average_files(paths, how.pop("rule", SWA), folder / "out.safetensors", **how)
    assert caught.value.code == code
    assert "\n" not in caught.value.message
    assert sorted(folder.iterdir()) == before, "nothing may be written"
    return caught.value


@pytest.mark.parametrize(("number", "data", "code"), BAD_FILES[::4])
def test_a_bad_checkpoint_among_good_ones_is_named(tmp_path: Path, number: int, data: bytes, code: str) -> None:
    """40-58: one damaged file stops the merge with its name and code, and nothing is written."""
    paths = save(tmp_path, {step: network(step) for step in (1, 2, 3)})
    paths[1].write_bytes(data)
    error = refused(tmp_path, paths, code)
    assert isinstance(error, CorruptError), number
    assert str(paths[1]) in error.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["big", "scalar", "bn.running_mean", "bn.running_var"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nan_and_infinity_are_refused(tmp_path: Path, value: float, name: str, dtype: torch.dtype) -> None:
    """59: one bad number in one checkpoint is found, and its file and tensor are named."""
    states = {step: network(step, dtype=dtype) for step in (1, 2, 3)}
    states[2][name].reshape(-1)[-1] = value
    paths = save(tmp_path, states)
    error = refused(tmp_path, paths, "not_finite")
    assert str(paths[1]) in error.message
    assert repr(name) in error.message


def test_bools_must_be_zero_or_one(tmp_path: Path) -> None:
    """A bool tensor with other bytes is damaged."""
    paths = save(tmp_path, {1: network(1), 2: network(2)})
    body = bytearray(paths[1].read_bytes())
    assert read_checkpoint([bytes(body)]).tensors["mask"].numel() == 5
    body[-1] = 7  # bools are written last
    paths[1].write_bytes(bytes(body))
    assert str(paths[1]) in refused(tmp_path, paths, "bad_value").message


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"extra": torch.ones(1)}, "tensors_differ"),
        ({"big": torch.ones(3, 1)}, "shape_changed"),
        ({"scalar": torch.ones(1)}, "shape_changed"),
        ({"big": torch.ones(3, 301, dtype=torch.int32)}, "dtype_changed"),
        ({"big": torch.ones(3, 301, dtype=torch.float16)}, "dtype_changed"),
    ],
)
def test_another_architecture_is_refused(tmp_path: Path, change: dict[str, Tensor], code: str) -> None:
    """60-62: extra tensors, other shapes (broadcastable ones too) and other dtypes are listed and refused."""
    paths = save(tmp_path, {1: network(1), 2: network(2) | change, 3: network(3)})
    error = refused(tmp_path, paths, code)
    assert isinstance(error, IncompatibleError)
    assert str(paths[1]) in error.message
    assert repr(next(iter(change))) in error.message


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    """60: what a checkpoint lacks is listed."""
    lacking = {name: value for name, value in network(2).items() if name != "big"}
    paths = save(tmp_path, {1: network(1), 2: lacking})
    assert "missing: 'big'" in refused(tmp_path, paths, "tensors_differ").message


def test_complex_tensors_are_refused(tmp_path: Path) -> None:
    """What cannot be averaged is refused before anything is read, with the reason."""
    paths = save(tmp_path, {step: {"w": torch.ones(2, dtype=torch.complex64)} for step in (1, 2)})
    assert "complex" in refused(tmp_path, paths, "unsupported_dtype").message


def test_records_are_checked_before_anything_is_visible(tmp_path: Path) -> None:
    """64: a checkpoint whose bytes are not the recorded ones is refused, asked for digests or not."""
    paths = save(tmp_path, {1: network(1), 2: network(2)})
    sources = [open_source(path, sha256="0" * 64, step=step) for step, path in enumerate(paths)]
    with pytest.raises(CorruptError) as caught:
        average_files(sources, SWA, tmp_path / "out.safetensors")
    assert caught.value.code == "digest_mismatch"
    assert not (tmp_path / "out.safetensors").exists()
    for source in sources:
        source.close()


def test_calls_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    """No sources, none that counts, one twice, one step twice, an output over an input: each is an error."""
    paths = save(tmp_path, {1: network(1), 2: network(2)})
    refused(tmp_path, [], "invalid_input")
    refused(tmp_path, paths, "invalid_input", rule=parse_rule("swa:start_step=9"))
    refused(tmp_path, [paths[0], paths[0]], "invalid_input")
    refused(tmp_path, paths, "ambiguous_steps", steps=[4, 4])
    refused(tmp_path, paths, "ambiguous_steps", steps=[4])
    for out in (paths[0], tmp_path):
        with pytest.raises(InvalidInputError):
            average_files(paths, SWA, out)
    for wrong in ({"accumulator_dtype": "bfloat16"}, {"num_threads": 0}, {"tile_elements": 0}):
        with pytest.raises(InvalidInputError):
            MergeOptions(**wrong)  # type: ignore[arg-type]


def test_an_output_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    """79: a folder that is not there is an error before any data is read."""
    paths = save(tmp_path, {1: network(1), 2: network(2)})
    with pytest.raises(InvalidInputError, match=r"missing/out\.safetensors cannot be written"):
        average_files(paths, SWA, tmp_path / "missing" / "out.safetensors")


_NO_ROOM = """
import resource, signal, sys
from wa_core.averaging.files.offline import average_files
from wa_core.errors import InvalidInputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    average_files(sys.argv[2:], "swa", sys.argv[1])
except InvalidInputError as error:
    print(error.code)
"""


def test_f22_no_room_for_the_output_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    """F22: what does not fit is said with a code, and no half file stays."""
    paths = save(tmp_path, {step: {"w": torch.full((5000,), float(step))} for step in (1, 2)})

    done = subprocess.run(
        [sys.executable, "-c", _NO_ROOM, tmp_path / "out.safetensors", *paths],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip

    assert done.stdout == "output_not_writable\n"
    assert sorted(tmp_path.iterdir()) == sorted(paths)
