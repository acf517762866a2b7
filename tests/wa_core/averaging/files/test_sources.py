"""Readable checkpoints: what is in them, what is refused, how often bytes are read."""

from __future__ import annotations

import hashlib
import io
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.averaging import WatchedStore
from support.bad_files import BAD_FILES, GOOD, f32, raw
from support.checkpoints import network
from wa_core.averaging.files.sources import INDEX_NAME, open_object, open_source
from wa_core.errors import (
    CorruptError,
    IncompatibleError,
    InvalidInputError,
    ObjectNotFoundError,
    WeightAveragingError,
)
from wa_core.store.memory import MemoryStore
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from pathlib import Path

    from support.seaweed import Seaweed
    from wa_core.averaging.files.sources import Source


def bytes_of(source: Source, name: str, begin: int = 0, end: int | None = None) -> bytes:
    """A stretch of a tensor, as the source reads it."""
    end = source.tensors[name].size_bytes if end is None else end
    out = bytearray(end - begin)
    source.read_into(name, begin, memoryview(out))
    return bytes(out)


def data_of(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes in row-major order."""
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy().data)


def sharded(folder: Path, shards: dict[str, dict[str, torch.Tensor]], **extra: str) -> Path:
    """A folder as Hugging Face lays a large model out; the index."""
    weight_map = {name: file for file, tensors in shards.items() for name in tensors} | extra
    for file, tensors in shards.items():
        (folder / file).write_bytes(serialize(tensors))
    index = folder / INDEX_NAME
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def refusal(path: Path, **record: Any) -> WeightAveragingError:
    """The error with which a file is refused; its message must be one readable line that names the file."""
    with pytest.raises(WeightAveragingError) as caught:
        open_source(path, **record)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 2000
    return caught.value


def test_a_file_gives_every_tensor_and_its_bytes(tmp_path: Path) -> None:
    """Specs, metadata and any stretch of any tensor are those that were saved."""
    state = network(7)
    path = tmp_path / "a.safetensors"
    path.write_bytes(serialize(state, metadata={"step": "7", "note": "x"}))

    source = open_source(path)

    assert source.step == 7
    assert source.metadata["note"] == "x"
    assert source.size_bytes == path.stat().st_size
    assert source.files == ("a.safetensors",)
    assert source.tensors.keys() == state.keys()
    for name, tensor in state.items():
        stored = source.tensors[name]
        assert (stored.spec.shape, stored.num_elements) == (tuple(tensor.shape), tensor.numel())
        assert stored.spec.dtype == str(tensor.dtype).removeprefix("torch.")
        assert bytes_of(source, name) == data_of(tensor)
    assert bytes_of(source, "big", 5, 99) == data_of(state["big"])[5:99]
    source.close()


def test_names_lose_their_wrappers_and_ties_come_back(tmp_path: Path) -> None:
    """Names are canonical; a tied name is an alias of the one stored."""
    shared = torch.randn(4)
    path = tmp_path / "a.safetensors"
    path.write_bytes(serialize({"module.head.w": shared, "module._orig_mod.embed.w": shared}))

    source = open_source(path)

    assert list(source.tensors) == ["embed.w"]
    assert source.ties == {"head.w": "embed.w"}
    source.close()


@pytest.mark.parametrize("clash", [["w", "module.w"], ["a._orig_mod.w", "a.w"]])
def test_two_names_for_one_canonical_name_are_refused(tmp_path: Path, clash: list[str]) -> None:
    """A collision is an error that names the tensor, never a silent overwrite."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(serialize({name: torch.randn(2) for name in clash}))
    error = refusal(path)
    assert isinstance(error, IncompatibleError)
    assert error.code == "name_collision"


@pytest.mark.parametrize(("number", "data", "code"), BAD_FILES)
def test_a_bad_file_is_refused_with_its_code(tmp_path: Path, number: int, data: bytes, code: str) -> None:
    """40-55, 58: a bad local file or object is refused when it is opened, with its name and a stable code."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    error = refusal(path)
    assert isinstance(error, CorruptError), number
    assert error.code == code, number

    store = MemoryStore()
    store.put("ck/bad.safetensors", data)
    with pytest.raises(CorruptError, match=r"bad\.safetensors: ") as caught:
        open_object(store, "ck/bad.safetensors")
    assert caught.value.code == code, number


def test_a_pickle_named_safetensors_is_not_opened(tmp_path: Path) -> None:
    """57: what torch.save writes is refused as not_safetensors, without being unpickled."""
    path = tmp_path / "a.safetensors"
    for is_zip in (True, False):
        body = io.BytesIO()
        torch.save({"w": torch.ones(9)}, body, _use_new_zipfile_serialization=is_zip)
        path.write_bytes(body.getvalue())
        assert refusal(path).code == "not_safetensors"


def test_a_hundred_thousand_tensors_are_opened(tmp_path: Path) -> None:
    """56: a large header is no reason to fail."""
    path = tmp_path / "many.safetensors"
    path.write_bytes(raw({f"layer.{i}": f32(4 * i, 4 * i + 4) for i in range(100_000)}, b"\0" * 400_000))
    source = open_source(path)
    assert len(source.tensors) == 100_000
    source.close()


def test_records_are_held_against_the_file(tmp_path: Path) -> None:
    """63, 64: another size than recorded is refused on opening, another digest when it is computed."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)
    assert refusal(path, size_bytes=len(GOOD) + 1).code == "size_mismatch"

    source = open_source(path, size_bytes=len(GOOD), sha256="0" * 64)
    with pytest.raises(CorruptError, match=r"a\.safetensors: the record says") as caught:
        source.digests()
    assert caught.value.code == "digest_mismatch"
    source.close()

    source = open_source(path, sha256=hashlib.sha256(GOOD).hexdigest())
    assert source.digests() == {"a.safetensors": hashlib.sha256(GOOD).hexdigest()}
    source.close()


def test_a_file_cut_off_after_opening_is_noticed(tmp_path: Path) -> None:
    """46: bytes that are gone by the time they are read are an error, never zeros."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(serialize({"w": torch.ones(1000)}))
    source = open_source(path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(CorruptError, match=r"a\.safetensors: ") as caught:
        bytes_of(source, "w")
    assert caught.value.code == "truncated_data"
    source.close()


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    """76: a name that leads nowhere is the caller's mistake, told with the name."""
    assert isinstance(refusal(tmp_path / "missing.safetensors"), InvalidInputError)
    assert isinstance(refusal(tmp_path / "missing.safetensors.index.json"), InvalidInputError)


@pytest.mark.parametrize("how", ["index", "folder"])
def test_a_sharded_checkpoint_is_one_source(tmp_path: Path, how: str) -> None:
    """An index and its files, or the folder that holds them, are one checkpoint with all tensors."""
    state = network(3)
    names = sorted(state)
    shards = {
        "m-1.safetensors": {n: state[n] for n in names[:3]},
        "m-2.safetensors": {n: state[n] for n in names[3:]},
    }
    index = sharded(tmp_path, shards)

    source = open_source(index if how == "index" else tmp_path, step=3)

    assert source.step == 3
    assert sorted(source.tensors) == names
    assert {name: bytes_of(source, name) for name in names} == {name: data_of(state[name]) for name in names}
    assert source.digests() == {
        file: hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() for file in sorted(shards)
    }
    source.close()


def test_a_folder_with_one_file_is_opened(tmp_path: Path) -> None:
    """A Hugging Face folder without an index has its weights in model.safetensors."""
    (tmp_path / "model.safetensors").write_bytes(GOOD)
    source = open_source(tmp_path)
    assert list(source.tensors) == ["w"]
    source.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": 3}',
        '{"weight_map": {"w": 3}}',
        '{"weight_map": {"w": "../m.safetensors"}}',
        '{"weight_map": {"w": "/etc/m.safetensors"}}',
        '{"weight_map": {"w": "m.bin"}}',
        '{"weight_map": {"other": "m.safetensors"}}',
        '{"weight_map": {"w": "m.safetensors", "other": "m.safetensors"}}',
        "[" * 100_000,
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, text: str) -> None:
    """An index that is damaged, leads out of its folder or disagrees with its files is refused with its name."""
    (tmp_path / "m.safetensors").write_bytes(GOOD)
    index = tmp_path / INDEX_NAME
    index.write_text(text)
    error = refusal(index)
    assert isinstance(error, CorruptError)
    assert error.code == "bad_index"


def test_one_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    """A tensor that two files hold has no one value."""
    state = {"w": torch.ones(3)}
    index = sharded(tmp_path, {"m-1.safetensors": {**state, "a": torch.ones(1)}, "m-2.safetensors": state})
    assert refusal(index).code == "duplicate_name"


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    """67: an index that names a missing file says which one."""
    index = sharded(tmp_path, {"m-1.safetensors": {"w": torch.ones(3)}})
    (tmp_path / "m-1.safetensors").unlink()
    with pytest.raises(InvalidInputError, match=r"m-1\.safetensors"):
        open_source(index)


def test_objects_are_read_by_ranges(seaweed: Seaweed) -> None:
    """An object's tensors are read from a real store byte for byte, and only those bytes that were asked for."""
    state = network(5, size=50_001)
    store = seaweed.new_store()
    store.put("ck/model.safetensors", serialize(state))
    watched = WatchedStore(store)

    source = open_object(watched, "ck/model.safetensors", name="s3://bucket/ck/model.safetensors")
    header = watched.bytes_read["ck/model.safetensors"]
    found = {name: bytes_of(source, name) for name in source.tensors}

    assert source.name == "s3://bucket/ck/model.safetensors"
    assert source.is_remote
    assert found == {name: data_of(tensor) for name, tensor in state.items()}
    assert header < 5_000
    assert watched.bytes_read["ck/model.safetensors"] == header + sum(map(len, found.values()))
    with pytest.raises(ObjectNotFoundError):
        open_object(store, "ck/missing.safetensors")


def test_a_small_object_is_fetched_with_one_request() -> None:
    """With its size recorded, a small object costs one request, whatever is read of it; a larger one does not."""
    state = {"w": torch.arange(100.0), "b": torch.ones(3)}
    body = serialize(state)
    store = WatchedStore(MemoryStore())
    store.put("m.safetensors", body)
    before = store.num_operations
    source = open_object(store, "m.safetensors", size_bytes=len(body), whole_bytes=len(body))
    assert {name: bytes_of(source, name) for name in state} == {name: data_of(state[name]) for name in state}
    assert source.digests() == {"m.safetensors": hashlib.sha256(body).hexdigest()}
    assert store.num_operations == before + 1
    assert store.bytes_read == {"m.safetensors": len(body)}
    source.close()

    source = open_object(store, "m.safetensors", whole_bytes=len(body) - 1)
    assert store.bytes_read["m.safetensors"] < 2 * len(body)
    source.close()
    for recorded in (len(body) - 1, len(body) + 1):
        with pytest.raises(CorruptError) as caught:
            open_object(store, "m.safetensors", size_bytes=recorded, whole_bytes=1 << 20)
        assert caught.value.code == "size_mismatch"


def test_a_sharded_checkpoint_in_a_store_is_one_source() -> None:
    """An index object and the objects beside it are one checkpoint."""
    store = MemoryStore()
    store.put("ck/m-1.safetensors", serialize({"a": torch.ones(2)}))
    store.put("ck/m-2.safetensors", serialize({"b": torch.zeros(3)}))
    weight_map = {"a": "m-1.safetensors", "b": "m-2.safetensors"}
    store.put(f"ck/{INDEX_NAME}", json.dumps({"weight_map": weight_map}).encode())

    source = open_object(store, f"ck/{INDEX_NAME}")

    assert sorted(source.tensors) == ["a", "b"]
    assert bytes_of(source, "a") == data_of(torch.ones(2))


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_no_damage_gets_past_the_gate_unnamed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever is cut, changed or put in, opening works or ends in an error of ours."""
    sound = serialize({"w": torch.ones(3), "n": torch.tensor(1)})
    begin = data.draw(st.integers(0, len(sound)))
    end = data.draw(st.integers(begin, len(sound)))
    path = tmp_path_factory.mktemp("damage") / "a.safetensors"
    path.write_bytes(sound[:begin] + data.draw(st.binary(max_size=20)) + sound[end:])
    try:
        open_source(path).close()
    except WeightAveragingError as error:
        assert str(path) in error.message  # noqa: PT017  either outcome is right
