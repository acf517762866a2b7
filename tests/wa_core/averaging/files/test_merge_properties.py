"""Properties of the offline merge: how weights lie in files, and when a merge was killed, does not show."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.checkpoints import exact_average, file_of
from wa_core.averaging.files.offline import MergeOptions, average_files
from wa_core.averaging.files.sources import FilesSource, open_source
from wa_core.averaging.files.staging import Staging
from wa_core.averaging.files.writers import StagedWriter
from wa_core.averaging.rules import parse_rule
from wa_core.tensors import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pytest
    from torch import Tensor

    from wa_core.averaging.files.writers import OutputFormat

STEPS = (10, 20, 40)
PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.")
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.uint8,
    torch.bool,
)  # fmt: skip
# Coefficients that are exact in binary, or a plain mean: then the exact average has one right rounding, ties too.
RULES = ("swa", "ema:decay=0.5,init=first", "window:last=2")
TIED, ORIGINAL = "head.weight", "t0"


@dataclass(frozen=True)
class Model:
    """What a run's checkpoints hold: dtype and size of each tensor; perhaps one is tied to the first."""

    tensors: tuple[tuple[torch.dtype, int], ...]
    has_tie: bool

    def state(self, step: int) -> dict[str, Tensor]:
        """The weights at a step, drawn for that step."""
        draw = torch.Generator().manual_seed(step)
        found = {
            f"t{number}": (torch.randn(size, generator=draw) * 3).to(dtype)
            for number, (dtype, size) in enumerate(self.tensors)
        }
        return found | ({TIED: found[ORIGINAL]} if self.has_tie else {})


models = st.builds(
    Model,
    st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 40)), min_size=1, max_size=6).map(tuple),
    st.booleans(),
)


def lay_out(folder: Path, state: Mapping[str, Tensor], data: st.DataObject) -> Path:
    """The same weights as some trainer may leave them: in any order, with any wrapper's prefix, in any shards."""
    is_tied = TIED in state and data.draw(st.booleans(), label="tie recorded")
    prefix = data.draw(st.sampled_from(PREFIXES), label="prefix")
    names = data.draw(st.permutations([name for name in state if not (is_tied and name == TIED)]), label="order")
    cut = data.draw(st.integers(0, len(names) - 1), label="cut")
    if is_tied or cut == 0:  # the entry that records a tie names tensors of its own file
        metadata = {"tied": json.dumps({prefix + TIED: prefix + ORIGINAL})} if is_tied else None
        path = folder.with_suffix(".safetensors")
        path.write_bytes(file_of([(prefix + name, state[name]) for name in names], metadata))
        return path
    folder.mkdir()
    shards = {"a.safetensors": names[:cut], "b.safetensors": names[cut:]}
    for file, part in shards.items():
        (folder / file).write_bytes(file_of([(prefix + name, state[name]) for name in part]))
    weight_map = {prefix + name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def expected(model: Model, spelling: str) -> dict[str, Tensor]:
    """The average in rational numbers, rounded once; the newest value of what is not averaged."""
    coefficients = parse_rule(spelling).coefficients(list(STEPS))
    parts = [Fraction(1, 3)] * 3 if spelling == "swa" else [Fraction(value) for value in coefficients.values()]
    assert sum(parts) == 1
    states = [model.state(step) for step in coefficients]
    return {
        name: exact_average([state[name] for state in states], parts)
        if tensor.is_floating_point() and tensor.numel()
        else tensor
        for name, tensor in states[-1].items()
    }


def is_same(found: Tensor, wanted: Tensor) -> bool:
    """Equal bits; float64 has no wider format to be summed in, so there a few last places may differ."""
    if wanted.dtype == torch.float64:
        return torch.allclose(found, wanted, rtol=1e-14, atol=1e-14)
    return found.dtype == wanted.dtype and torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def read(files: Sequence[Path]) -> dict[str, Tensor]:
    """All tensors of an output, ties resolved."""
    found: dict[str, Tensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            found |= read_checkpoint([path.read_bytes()]).tensors
    return found


@given(
    model=models,
    spelling=st.sampled_from(RULES),
    tile=st.integers(1, 50),
    threads=st.integers(1, 4),
    shard_bytes=st.none() | st.integers(1, 400),
    file_format=st.sampled_from(["safetensors", "hf"]),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_how_the_weights_lie_in_files_does_not_show(
    tmp_path_factory: pytest.TempPathFactory,
    model: Model,
    spelling: str,
    tile: int,
    threads: int,
    shard_bytes: int | None,
    file_format: OutputFormat,
    data: st.DataObject,
) -> None:
    """Order of tensors, prefixes, shards, ties, tiles, threads, the output's cut: the average is the exact one."""
    folder = tmp_path_factory.mktemp("layout")
    sources = [lay_out(folder / f"step_{step}", model.state(step), data) for step in STEPS]
    output = folder / ("average" if file_format == "hf" else "average.safetensors")
    writer = StagedWriter(Staging(output, job=[]), file_format=file_format, max_shard_bytes=shard_bytes)

    report = average_files(
        data.draw(st.permutations(sources), label="sources"), spelling, writer,
        options=MergeOptions(tile_elements=tile, num_threads=threads),
    )  # fmt: skip

    found, wanted = read(report.files), expected(model, spelling)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert is_same(found[name], tensor), name


class Kill(BaseException):
    """Ends a merge as a kill does, for the test's process only."""


class Killing(FilesSource):
    """A source that takes a picture of the work folder when some bytes have been read, and then ends the merge.

    The picture is what a SIGKILL at that moment leaves: the system has all that was written. The journal is copied
    first, so that it does not know more than the data beside it.
    """

    def __init__(self, path: Path, *, work: Path, picture: Path, after_bytes: int) -> None:
        opened = open_source(path)
        super().__init__(opened.name, opened._parts)
        self._work, self._picture, self._left, self._mutex = work, picture, after_bytes, threading.Lock()

    def read_into(self, name: str, begin: int, out: memoryview) -> None:
        """Read, or take the picture and end."""
        with self._mutex:
            self._left -= len(out)
            if self._left < 0:
                self._take_picture()
                raise Kill
        super().read_into(name, begin, out)

    def _take_picture(self) -> None:
        try:
            self._picture.mkdir()
        except FileExistsError:  # another source was first
            return
        files = sorted(self._work.iterdir(), key=lambda path: path.name != "journal.jsonl")
        for path in files:
            copy = self._picture / path.name
            shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)


def spoil(work: Path, layout: bytes, journal: bytes) -> None:
    """Make garbage of all data that the journal does not vouch for: a kill cuts a write anywhere."""
    (work / "journal.jsonl").write_bytes(journal)
    length = int.from_bytes(layout[:8], "little")
    offsets = {
        name: entry["data_offsets"]
        for name, entry in json.loads(layout[8 : 8 + length]).items()
        if name != "__metadata__"
    }
    noted = bytearray(len(layout))
    for line in journal.splitlines():
        try:
            name, begin, end = json.loads(line)
        except ValueError:
            continue  # cut by the kill, this one or the one before
        at = 8 + length + offsets[name][0]
        noted[at + begin : at + end] = b"\1" * (end - begin)
    for path in work.glob("*.data"):
        content = path.read_bytes()
        path.write_bytes(bytes(byte if is_noted else 0xAB for byte, is_noted in zip(content, noted, strict=True)))


parts = st.floats(0, 1, width=32)


@given(
    model=models.filter(lambda model: sum(size for _, size in model.tensors) > 2),
    spelling=st.sampled_from(RULES),
    threads=st.integers(1, 3),
    # Of each kill: after which part of the bytes, with which tiles, and how much of the journal is left. Parts, as
    # how long a journal has become by then is the threads' affair.
    kills=st.lists(st.tuples(parts, st.integers(1, 50), parts), min_size=2, max_size=2),
    last_tile=st.integers(1, 50),
)
@settings(max_examples=25, deadline=None)
def test_f1_a_merge_killed_at_any_byte_goes_on_to_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    model: Model,
    spelling: str,
    threads: int,
    kills: list[tuple[float, int, float]],
    last_tile: int,
) -> None:
    """Killed after any number of bytes, with any part of the journal, twice: the output has the bits of one go."""
    folder = tmp_path_factory.mktemp("kill")
    paths = []
    for step in STEPS:
        paths.append(folder / f"step_{step}.safetensors")
        paths[-1].write_bytes(file_of(list(model.state(step).items())))
    output = folder / "average.safetensors"
    work, size = folder / ".average.safetensors.part", sum(path.stat().st_size for path in paths)

    def merge(sources: Sequence[Any], tile: int) -> bytes:
        writer = StagedWriter(Staging(output, job=["one"], note_every_s=0), file_format="safetensors")
        average_files(
            sources, spelling, writer, steps=STEPS, options=MergeOptions(tile_elements=tile, num_threads=threads)
        )
        return output.read_bytes()

    once = merge(paths, 50)
    output.unlink()
    for number, (read, tile, left) in enumerate(kills):
        picture = folder / f"picture-{number}"
        after = int(read * size)
        killing = [Killing(path, work=work, picture=picture, after_bytes=after // 3) for path in paths]
        with suppress(Kill):
            assert merge(killing, tile) == once
        if not picture.exists():
            continue  # it was done before the kill came
        journal = picture / "journal.jsonl"
        noted = journal.read_bytes() if journal.exists() else b""
        shutil.rmtree(work)
        picture.replace(work)
        spoil(work, once, noted[: int(left * len(noted))])

    assert merge(paths, last_tile) == once
    assert not work.exists()
