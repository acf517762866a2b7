"""Files of `torch.save` that were written without torch, against torch itself."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch

from support.averaging import same_bits
from wa_core.averaging.files.archive import write_archive
from wa_core.averaging.files.sources import open_source
from wa_core.header import DTYPE_BYTES
from wa_core.specs import torch_dtype_name
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from wa_core.averaging.files.stored import StoredTensor


def exported(state: dict[str, torch.Tensor], folder: Path) -> Path:
    """`state` as an archive, by way of a safetensors file, seven bytes at a time."""
    path = folder / "in.safetensors"
    path.write_bytes(serialize(state))
    source = open_source(path)

    def blocks(tensor: StoredTensor) -> Iterator[memoryview]:
        for begin in range(0, tensor.size_bytes, 7):
            block = bytearray(min(7, tensor.size_bytes - begin))
            source.read_into(tensor.spec.name, begin, memoryview(block))
            yield memoryview(block)

    write_archive(folder / "out.pt", [*source.tensors.values()], ties=source.ties, blocks=blocks)
    source.close()
    return folder / "out.pt"


@pytest.mark.parametrize("is_mapped", [False, True])
def test_every_dtype_loads_as_it_was(tmp_path: Path, is_mapped: bool) -> None:  # noqa: FBT001  a parameter
    """Each dtype of the format comes back bit for bit with ``weights_only``, mapped or read; so do empty ones."""
    random = torch.Generator().manual_seed(0)
    state = {
        f"layer.{name}": torch.randint(0, 2, (3, 5 * size), dtype=torch.uint8, generator=random).view(
            getattr(torch, torch_dtype_name(name))
        )
        for name, size in DTYPE_BYTES.items()
    }
    state |= {"scalar": torch.tensor(3), "empty": torch.empty(0, 4), "flat": torch.arange(1000.0)}
    loaded = torch.load(exported(state, tmp_path), weights_only=True, mmap=is_mapped)
    assert list(loaded) == sorted(state)
    as_bytes = {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in state.items()}
    assert same_bits({name: tensor.reshape(-1).view(torch.uint8) for name, tensor in loaded.items()}, as_bytes)
    for name, tensor in loaded.items():
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (
            state[name].dtype,
            state[name].shape,
            state[name].stride(),
        )


def test_tied_tensors_share_memory_again(tmp_path: Path) -> None:
    """An alias is stored once, and changing the one changes the other after loading."""
    weight = torch.arange(6.0).reshape(2, 3)
    loaded = torch.load(exported({"embed": weight, "head": weight, "own": weight.clone()}, tmp_path))
    loaded["embed"][0, 0] = 7
    assert loaded["head"][0, 0] == 7
    assert loaded["own"][0, 0] == 0


def test_the_archive_is_a_sound_zip(tmp_path: Path) -> None:
    """Every checksum holds, nothing is deflated, and each storage begins at a multiple of 64 bytes."""
    path = exported({f"w{number}": torch.randn(number) for number in range(1, 40)}, tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        entries = archive.infolist()
    raw = path.read_bytes()
    for entry in entries:
        begin = entry.header_offset
        name, extra = (int.from_bytes(raw[begin + at : begin + at + 2], "little") for at in (26, 28))
        assert entry.compress_type == zipfile.ZIP_STORED
        assert (begin + 30 + name + extra) % 64 == 0


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    """No time of day and no random number is in the file."""
    state = {"weight": torch.randn(100)}
    assert exported(state, tmp_path).read_bytes() == exported(state, tmp_path).read_bytes()


def test_f22_a_full_disk_is_said(tmp_path: Path) -> None:
    """F22: what cannot be written is an error that says why; here a file that may not grow further."""
    code = """
import resource, sys
from pathlib import Path
from wa_core.averaging.files.archive import write_archive
from wa_core.averaging.files.stored import StoredTensor
from wa_core.errors import InvalidInputError
from wa_core.specs import TensorSpec

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
tensor = StoredTensor(TensorSpec("w", "float32", (4096,)), "F32", 16384)
try:
    write_archive(Path(sys.argv[1]), [tensor], ties={}, blocks=lambda _: [memoryview(bytes(16384))])
except InvalidInputError as error:
    print(error.code, error.message)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "x.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("output_not_writable")
    assert "File too large" in done.stdout
