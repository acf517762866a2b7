"""Bad checkpoints 40 to 64 at every door of the library, each under its number: nothing of them is ever folded."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from support.bad_checkpoints import bad_files, good_state, many_tensors, misfit, misfits, wrong_records
from support.bad_files import GOOD
from support.hostile import Canary
from wa_core.averaging.files.offline import MergeOptions, average_files
from wa_core.averaging.files.output import SafetensorsWriter
from wa_core.averaging.files.sources import open_object, open_source
from wa_core.averaging.rules import SwaRule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.averaging.streamed_shadow import StreamedShadow
from wa_core.averaging.streaming import fold_source
from wa_core.errors import CorruptError, InvalidInputError, WeightAveragingError
from wa_core.store.memory import MemoryStore
from wa_core.tensors import read_checkpoint, serialize

if TYPE_CHECKING:
    from pathlib import Path

FILES = bad_files()
MISFITS = misfits(200)


def check_files(folder: Path, number: int, *codes: str) -> None:
    """Let every reader of files refuse all files of a number, with these codes among them."""
    found = [bad for name, bad in FILES.items() if name.startswith(f"{number}_")]
    assert {bad.code for bad in found} == set(codes)
    for bad in found:
        check_readers(bad.body, bad.code)
        check_openers(folder, bad.body, bad.code, words=bad.words)
        check_merge(folder, bad.body, bad.code, words=bad.words)


def check_readers(body: bytes, code: str) -> None:
    """Whole or in single bytes, with or without a record: `read_checkpoint` refuses it."""
    record = {"size_bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    few = [body[:100][at : at + 1] for at in range(min(len(body), 100))] + [body[100:]]
    for chunks, known in ([body], {}), ([body], record), (few, {}):
        with pytest.raises(CorruptError) as caught:
            read_checkpoint(chunks, **known)  # type: ignore[arg-type]
        check_error(caught.value, code)


def check_openers(folder: Path, body: bytes, code: str, *, words: str) -> None:
    """As a file, as an object, and as one of several shards it is refused before its data is read."""
    path = folder / "step_200.safetensors"
    path.write_bytes(body)
    store = MemoryStore()
    store.put("run/step_200.safetensors", body)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"layer.weight": path.name}}))
    for opened in (
        lambda: open_source(path),
        lambda: open_object(store, "run/step_200.safetensors"),
        lambda: open_source(index),
    ):
        with pytest.raises(CorruptError) as caught:
            opened()
        check_error(caught.value, code, words, "step_200.safetensors")
    path.unlink()
    index.unlink()


def check_merge(folder: Path, body: bytes, code: str, *, words: str) -> None:
    """Between good checkpoints it stops the offline average: named, nothing written, an older output untouched."""
    paths = [folder / f"step_{step}.safetensors" for step in (100, 200, 300)]
    for path in paths:
        path.write_bytes(serialize(good_state(int(path.stem.removeprefix("step_")))))
    paths[1].write_bytes(body)
    out = folder / "out.safetensors"
    out.write_bytes(b"an older output")

    with pytest.raises(WeightAveragingError) as caught:
        average_files(paths, SwaRule(), out)

    check_error(caught.value, code, words, str(paths[1]))
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in (*paths, out))
    assert out.read_bytes() == b"an older output"


def check_folds(folder: Path, name: str) -> None:
    """A misfit leaves `ShadowWeights` as it was; the streaming fold goes on without it, or says that it cannot."""
    bad = MISFITS[name]
    expected = ShadowWeights(SwaRule(), dtype=torch.float64)
    shadow = ShadowWeights(SwaRule(), dtype=torch.float64)
    streamed = StreamedShadow(SwaRule(), dtype="float64")
    for one in (expected, shadow):
        one.fold(good_state(100), step=100)
    fold(streamed, serialize(good_state(100)), step=100)

    with pytest.raises(WeightAveragingError) as caught:
        shadow.fold(read_checkpoint([bad.body]).tensors, step=200)
    check_error(caught.value, bad.code, bad.words)
    with pytest.raises(WeightAveragingError) as caught:
        fold(streamed, bad.body, step=200)
    check_error(caught.value, bad.code, "step_200.safetensors")

    for one in (expected, shadow):
        one.fold(good_state(300), step=300)
    assert serialize(shadow.value()) == serialize(expected.value())
    if streamed.is_broken:  # some blocks have the misfit in them
        with pytest.raises(InvalidInputError, match="restore it"):
            fold(streamed, serialize(good_state(300)), step=300)
    else:
        fold(streamed, serialize(good_state(300)), step=300)
        assert value_of(streamed, folder) == serialize(expected.value())


def check_error(error: WeightAveragingError, code: str, *words: str) -> None:
    """The code, and one line for people that has all these words."""
    assert error.code == code
    assert "\n" not in error.message
    assert len(error.message) < 2000
    for some in words:
        assert some in error.message


def fold(shadow: StreamedShadow, body: bytes, *, step: int, sha256: str | None = None) -> None:
    """Fold an object's bytes."""
    store = MemoryStore()
    store.put(f"step_{step}.safetensors", body)
    fold_source(open_object(store, f"step_{step}.safetensors", sha256=sha256), [shadow], step=step)


def value_of(shadow: StreamedShadow, folder: Path) -> bytes:
    """The average as a file without metadata of its own."""
    path = folder / "value.safetensors"
    shadow.write_value(SafetensorsWriter(path), metadata={})
    return serialize(read_checkpoint([path.read_bytes()]).tensors)


def test_40_an_empty_file(tmp_path: Path) -> None:
    """It is told from one that was cut off."""
    check_files(tmp_path, 40, "empty_file")


def test_41_seven_bytes(tmp_path: Path) -> None:
    """Not even the header's length is there."""
    check_files(tmp_path, 41, "truncated_header")


def test_42_a_header_of_2_to_the_63_bytes(tmp_path: Path) -> None:
    """The claim is refused before anything is allocated for it."""
    check_files(tmp_path, 42, "header_too_large")


def test_43_a_header_longer_than_the_file(tmp_path: Path) -> None:
    """The header's length and the file's do not agree."""
    check_files(tmp_path, 43, "header_length")


def test_44_a_header_over_16_mb(tmp_path: Path) -> None:
    """The limit is in the message."""
    check_files(tmp_path, 44, "header_too_large")


def test_45_a_header_that_is_no_json(tmp_path: Path) -> None:
    """Nonsense, bad UTF-8, endless nesting or digits, another type, and JSON that is no header."""
    check_files(tmp_path, 45, "header_not_json", "bad_entry")


def test_46_truncated_data(tmp_path: Path) -> None:
    """One byte less is enough, and a claimed terabyte is no reason to allocate one."""
    check_files(tmp_path, 46, "truncated_data")


def test_46_data_that_is_cut_off_while_it_is_folded() -> None:
    """An object that has become shorter since it was opened breaks the fold; zeros are never folded."""
    store = MemoryStore()
    body = serialize(good_state(200) | {"large": torch.ones(1 << 20)})
    store.put("step_200.safetensors", body)
    source = open_object(store, "step_200.safetensors")
    store.put("step_200.safetensors", body[:-1])
    shadow = StreamedShadow(SwaRule())

    with pytest.raises(CorruptError) as caught:
        fold_source(source, [shadow], step=200)

    check_error(caught.value, "truncated_data", "step_200.safetensors")
    assert shadow.n_averaged == 0


def test_47_trailing_bytes(tmp_path: Path) -> None:
    """What follows the last tensor has no meaning, so the file is not what it should be."""
    check_files(tmp_path, 47, "trailing_bytes")


def test_48_overlapping_tensors(tmp_path: Path) -> None:
    """No byte belongs to two tensors, whole overlaps included."""
    check_files(tmp_path, 48, "overlap")


def test_49_a_hole_between_tensors(tmp_path: Path) -> None:
    """Every byte belongs to a tensor, the first ones included."""
    check_files(tmp_path, 49, "hole")


def test_50_offsets_that_disagree_with_shape_and_dtype(tmp_path: Path) -> None:
    """Other sizes, and sizes and offsets that are no counts."""
    check_files(tmp_path, 50, "shape_mismatch", "bad_entry")


def test_51_a_shape_that_overflows(tmp_path: Path) -> None:
    """A product beyond 64 bits is refused, also where a zero would make it small again."""
    check_files(tmp_path, 51, "shape_overflow", "bad_entry")


def test_52_an_unknown_dtype(tmp_path: Path) -> None:
    """The dtypes that there are are in the message."""
    check_files(tmp_path, 52, "unknown_dtype")


def test_53_a_duplicate_tensor_name(tmp_path: Path) -> None:
    """A file whose meaning depends on the reader has none."""
    check_files(tmp_path, 53, "duplicate_name")


def test_54_names_with_dots_nul_and_newline(tmp_path: Path) -> None:
    """Paths upwards, control and direction characters, lone surrogates, empty and endless names."""
    check_files(tmp_path, 54, "bad_name")
    for name in ("a..b", "..", "w\0", "w\n", "w\x1b[31m", "w\u2028"):
        with pytest.raises(InvalidInputError):
            serialize({name: torch.ones(2)})  # nor are they ever written


def test_55_no_tensors(tmp_path: Path) -> None:
    """An empty header, and one of metadata alone."""
    check_files(tmp_path, 55, "no_tensors")
    with pytest.raises(InvalidInputError, match="without tensors"):
        ShadowWeights(SwaRule()).fold({}, step=1)


_MANY = """
import resource, sys, torch
from pathlib import Path
from wa_core.averaging.files.output import SafetensorsWriter
from wa_core.averaging.files.sources import open_source
from wa_core.averaging.rules import SwaRule
from wa_core.averaging.streamed_shadow import StreamedShadow
from wa_core.averaging.streaming import fold_source
def peak_mb():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024
before = peak_mb()
shadow = StreamedShadow(SwaRule())
for step in (1, 2):
    source = open_source(sys.argv[1])
    fold_source(source, [shadow], step=step)
    source.close()
shadow.write_value(SafetensorsWriter(Path(sys.argv[2])), metadata={})
print(peak_mb() - before)
"""


@pytest.mark.timeout(600)
def test_56_100_000_tensors_are_folded_in_bounded_memory(tmp_path: Path) -> None:
    """They work: two folds and the average's file take less than 300 MB on top of torch itself."""
    path, out = tmp_path / "many.safetensors", tmp_path / "out.safetensors"
    path.write_bytes(many_tensors())

    done = subprocess.run(
        [sys.executable, "-c", _MANY, path, out], capture_output=True, text=True, check=True, timeout=580
    )

    assert int(done.stdout) < 300
    assert len(read_checkpoint([out.read_bytes()]).tensors) == 100_000


def test_56_more_tensors_than_a_header_holds_are_refused() -> None:
    """The limit is the header's 16 MB: some 200,000 tensors; beyond it the refusal says so."""
    with pytest.raises(CorruptError) as caught:
        read_checkpoint([many_tensors(250_000)])
    check_error(caught.value, "header_too_large", "over the limit of 16777216")


def test_56_100_000_other_tensors_are_listed_in_short(tmp_path: Path) -> None:
    """What differs in 100,000 places is told in one line of bearable length."""
    bad = MISFITS["56_100_000_other_tensors"]
    check_merge(tmp_path, bad.body, bad.code, words=bad.words)
    check_folds(tmp_path, "56_100_000_other_tensors")


def test_57_a_pickle_named_safetensors(tmp_path: Path) -> None:
    """Every protocol, and the archive of torch.save; nothing is unpickled, as a canary shows."""
    check_files(tmp_path, 57, "not_safetensors", "header_too_large")
    canary = tmp_path / "canary"
    torch.save({"w": Canary(canary)}, tmp_path / "model.safetensors")

    with pytest.raises(CorruptError, match="zip archive"):
        open_source(tmp_path / "model.safetensors")

    assert not canary.exists()


def test_58_an_html_page(tmp_path: Path) -> None:
    """An error page, XML or JSON under the name of a checkpoint is told as such."""
    check_files(tmp_path, 58, "not_safetensors")


@pytest.mark.parametrize("name", [name for name in MISFITS if name.startswith("59")])
def test_59_nan_and_infinity(tmp_path: Path, name: str) -> None:
    """Found anywhere, with the tensor's name; neither average nor output ever has any."""
    bad = MISFITS[name]
    check_merge(tmp_path, bad.body, bad.code, words=bad.words)
    check_folds(tmp_path, name)


@pytest.mark.parametrize("name", [name for name in MISFITS if name.startswith("60")])
def test_60_missing_or_extra_tensors(tmp_path: Path, name: str) -> None:
    """The difference is listed: what is missing and what is extra, with dtype and shape."""
    bad = MISFITS[name]
    check_merge(tmp_path, bad.body, bad.code, words=bad.words)
    check_folds(tmp_path, name)


@pytest.mark.parametrize("name", [name for name in MISFITS if name.startswith("61")])
def test_61_changed_shapes(tmp_path: Path, name: str) -> None:
    """Also those that arithmetic would broadcast without a word."""
    bad = MISFITS[name]
    check_merge(tmp_path, bad.body, bad.code, words=bad.words)
    check_folds(tmp_path, name)


@pytest.mark.parametrize("name", [name for name in MISFITS if name.startswith("62")])
def test_62_changed_dtypes(tmp_path: Path, name: str) -> None:
    """A float that became an int, an int that became a float, and another float."""
    bad = MISFITS[name]
    check_merge(tmp_path, bad.body, bad.code, words=bad.words)
    check_folds(tmp_path, name)


@pytest.mark.parametrize("name", [name for name in wrong_records(200) if name.startswith("63")])
def test_63_another_size_than_recorded(tmp_path: Path, name: str) -> None:
    """Whoever reads with a record refuses it before the data: the reader, the file and the object."""
    bad = wrong_records(200)[name]
    path = tmp_path / "step_200.safetensors"
    path.write_bytes(bad.body)
    store = MemoryStore()
    store.put("step_200.safetensors", bad.body)
    for opened in (
        lambda: read_checkpoint([bad.body], **bad.claims),
        lambda: open_source(path, **bad.claims),
        lambda: open_object(store, "step_200.safetensors", **bad.claims),
    ):
        with pytest.raises(CorruptError) as caught:
            opened()
        check_error(caught.value, bad.code, bad.words)


def test_64_another_sha256_than_recorded(tmp_path: Path) -> None:
    """One flipped bit: reader, streaming fold and offline average refuse it, and nothing is written."""
    bad = wrong_records(200)["64_one_flipped_bit"]
    path, out = tmp_path / "step_200.safetensors", tmp_path / "out.safetensors"
    path.write_bytes(bad.body)
    shadow = StreamedShadow(SwaRule())
    for read in (
        lambda: read_checkpoint([bad.body], **bad.claims),
        lambda: fold(shadow, bad.body, step=200, **bad.claims),
        lambda: average_files([open_source(path, **bad.claims)], SwaRule(), out, options=MergeOptions()),
    ):
        with pytest.raises(CorruptError) as caught:
            read()
        check_error(caught.value, bad.code, bad.words)
    assert shadow.n_averaged == 0
    assert [found.name for found in tmp_path.iterdir()] == ["step_200.safetensors"]


def test_the_good_ones_are_good(tmp_path: Path) -> None:
    """What the bad ones are measured against goes through every door."""
    assert read_checkpoint([GOOD]).tensors.keys() == {"w"}
    shadow = StreamedShadow(SwaRule())
    fold(shadow, misfit(200, {}), step=200)
    assert value_of(shadow, tmp_path) == serialize(good_state(200))
