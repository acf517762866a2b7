"""Reading and writing checkpoints: every bad file by its number, and the safetensors library as second opinion."""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import re
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.bad_files import BAD_FILES, GOOD, f32, raw
from wa_core.errors import CorruptError, InvalidInputError
from wa_core.specs import spec_digest
from wa_core.tensors import (
    check_finite,
    map_checkpoint,
    read_checkpoint,
    serialize,
    spec_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


def sample() -> dict[str, Tensor]:
    """One tensor of every kind that checkpoints hold."""
    shared = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    return {
        "head.weight": shared,
        "embedding.weight": shared,
        "conv.weight": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "half": torch.randn(3).half(),
        "brain": torch.randn(3).bfloat16(),
        "double": torch.randn(3).double(),
        "eighth": torch.ones(3).to(torch.float8_e4m3fn),
        "counter": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "complex": torch.ones(2, dtype=torch.complex64),
        "empty": torch.empty(0, 3),
    }


def code_of(data: bytes, **record: Any) -> str:
    """The code with which a file is refused; the message must be one readable line."""
    with pytest.raises(CorruptError) as caught:
        read_checkpoint([data], **record)
    assert 20 < len(caught.value.message) < 2000
    assert "\n" not in caught.value.message
    return caught.value.code


@pytest.mark.parametrize(("number", "data", "code"), BAD_FILES)
def test_a_bad_file_is_refused_with_its_code(number: int, data: bytes, code: str) -> None:
    """40-55, 58: each bad file is refused with a stable code, whether or not its size and digest were recorded."""
    assert code_of(data) == code, number
    assert code_of(data, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) == code, number


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_is_no_checkpoint(*, is_zip: bool) -> None:
    """57: what torch.save writes is refused as not_safetensors, without being unpickled."""
    body = io.BytesIO()
    torch.save({"w": torch.ones(9)}, body, _use_new_zipfile_serialization=is_zip)
    assert code_of(body.getvalue()) == "not_safetensors"


def test_many_tensors_are_read() -> None:
    """56: 100,000 tensors are a large header, and no reason to fail."""
    names = [f"layer.{i}.weight" for i in range(100_000)]
    data = raw({name: f32(4 * i, 4 * i + 4) for i, name in enumerate(names)}, b"\0" * 400_000)
    assert len(read_checkpoint([data]).tensors) == 100_000


def test_a_record_of_another_size_is_refused() -> None:
    """63: a sound file of another size than recorded is a size_mismatch, in either direction."""
    assert code_of(GOOD, size_bytes=len(GOOD) + 1) == "size_mismatch"
    assert code_of(GOOD, size_bytes=len(GOOD) - 1) == "size_mismatch"
    assert code_of(GOOD[:-1], size_bytes=len(GOOD)) == "size_mismatch"
    assert code_of(GOOD + b"\0", size_bytes=len(GOOD)) == "size_mismatch"


def test_any_flipped_bit_is_noticed() -> None:
    """64: with a recorded digest, no single flipped bit gets through."""
    data = serialize({"w": torch.randn(5), "n": torch.tensor(3)})
    digest = hashlib.sha256(data).hexdigest()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        code = code_of(bytes(damaged), size_bytes=len(data), sha256=digest)
        if position >= len(data) - 28:
            assert code == "digest_mismatch"
    assert read_checkpoint([data], size_bytes=len(data), sha256=digest).sha256 == digest


def test_a_mapped_file_is_what_was_written(tmp_path: Path) -> None:
    """Mapped tensors have the bits, dtypes, shapes and ties of the file; writing to them leaves the file alone."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(serialize(sample()))
    before = path.read_bytes()
    mapped, read = map_checkpoint(path), read_checkpoint([before]).tensors
    assert spec_of(mapped) == spec_of(read)
    for name, tensor in read.items():
        assert torch.equal(mapped[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert mapped["head.weight"] is mapped["embedding.weight"]
    mapped["half"].zero_()
    assert path.read_bytes() == before


def test_a_mapped_file_takes_no_memory(tmp_path: Path) -> None:
    """Reading 64 MiB through the map adds nothing to the memory that the system could not take back."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(serialize({"weight": torch.ones(16 << 20)}))
    held = re.compile(r"RssAnon:\s+(\d+) kB")

    def held_kib() -> int:
        return int(held.findall(Path("/proc/self/status").read_text())[0])

    before = held_kib()
    weight = map_checkpoint(path)["weight"]
    assert bool(weight.min() == 1)
    assert held_kib() - before < 16 << 10


@pytest.mark.parametrize(("number", "data", "code"), BAD_FILES)
def test_a_bad_file_is_not_mapped(number: int, data: bytes, code: str, tmp_path: Path) -> None:
    """40-55, 58: what cannot be read is not mapped either."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CorruptError):
        map_checkpoint(path)


def test_endless_data_is_cut_short() -> None:
    """47: a stream that never ends is refused as soon as it is too long."""

    def endless() -> Iterator[bytes]:
        yield GOOD
        while True:
            yield b"\0" * 1000

    with pytest.raises(CorruptError) as caught:
        read_checkpoint(endless())
    assert caught.value.code == "trailing_bytes"


def test_a_claimed_terabyte_costs_no_memory() -> None:
    """46: memory follows the bytes that arrive, not those that a header claims."""
    huge = raw({"w": f32(0, 4 << 38)}, b"\0" * 100)
    tracemalloc.start()
    try:
        assert code_of(huge) == "truncated_data"
        assert code_of(huge, size_bytes=len(huge)) == "truncated_data"
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_bools_must_be_zero_or_one() -> None:
    """A bool tensor with another byte has no meaning, and is refused."""
    data = raw({"w": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\x01\x02")
    assert code_of(data) == "bad_value"


@pytest.mark.parametrize(
    "tied", ["{", "[]", '{"a": "missing"}', '{"w": "w"}', '{"a": 3}', '{"a": ["w"]}', "[" * 50_000]
)
def test_ties_must_fit_the_file(tied: str) -> None:
    """A `tied` entry that names tensors the file does not have is refused."""
    assert code_of(raw({"w": f32(0, 8), "__metadata__": {"tied": tied}}, b"\0" * 8)) == "bad_ties"
    hostile = json.dumps({"../x": "w"})
    assert code_of(raw({"w": f32(0, 8), "__metadata__": {"tied": hostile}}, b"\0" * 8)) == "bad_name"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_damage_crashes_the_reader(data: st.DataObject) -> None:
    """Any cut, flip or splice of a good file is read or refused with a CorruptError, never anything else."""
    good = bytearray(serialize({"w": torch.ones(3), "tied": torch.ones(2), "n": torch.tensor(1)}))
    position = data.draw(st.integers(0, len(good)))
    patch = data.draw(st.binary(max_size=12) | st.sampled_from([b"[" * 9, b'"w":', b"-1", b"1e999", b"null"]))
    keep = data.draw(st.integers(0, 12))
    damaged = bytes(good[:position] + patch + good[position + keep :])
    with suppress(CorruptError):
        read_checkpoint([damaged])


@pytest.mark.parametrize("is_recorded", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_a_checkpoint_survives_in_any_chunks(*, is_recorded: bool, seed: int) -> None:
    """What was written is read back bit for bit, wherever the stream was cut, with empty chunks between."""
    state, cuts = sample(), random.Random(seed)
    data = serialize(state, metadata={"step": "5"})
    places = sorted(cuts.choices(range(len(data) + 1), k=[0, 3, 50, 300, 2000][seed]))
    chunks = [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]
    record = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} if is_recorded else {}

    found = read_checkpoint(chunks, **record)  # type: ignore[arg-type]

    assert serialize(found.tensors, metadata={"step": "5"}) == data
    assert found.specs == spec_of(state)
    assert (found.size_bytes, found.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert found.metadata["step"] == "5"
    for name, tensor in state.items():
        assert found.tensors[name].shape == tensor.shape
        assert torch.equal(found.tensors[name].to(torch.complex64), tensor.to(torch.complex64))


def test_tensors_larger_than_the_first_buffer_are_read() -> None:
    """A tensor of 40 MB arrives whole, whether its size is known beforehand or not."""
    state = {"w": torch.arange(10_000_000, dtype=torch.float32)}
    data = serialize(state)
    chunks = [data[i : i + 1_000_003] for i in range(0, len(data), 1_000_003)]
    for size_bytes in (None, len(data)):
        assert torch.equal(read_checkpoint(chunks, size_bytes=size_bytes).tensors["w"], state["w"])


def test_the_safetensors_library_reads_our_files() -> None:
    """The library finds the same tensors in our files; with restore_ties, aliases too."""
    state = sample()
    plain, full = (safetensors.torch.load(serialize(state, restore_ties=flag)) for flag in (False, True))
    assert set(state) - set(plain) == {"head.weight"}
    assert set(full) == set(state)
    for name, tensor in full.items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor.to(torch.complex64), state[name].to(torch.complex64))


def test_we_read_the_safetensors_librarys_files() -> None:
    """A file of the library is read with the tensors it was given."""
    state = {name: tensor.contiguous().clone() for name, tensor in sample().items()}
    found = read_checkpoint([safetensors.torch.save(state, metadata={"a": "b"})])
    assert found.metadata == {"a": "b"}
    assert serialize(found.tensors) == serialize(state)


def test_every_tensor_is_aligned() -> None:
    """In our files each tensor begins at a multiple of its element size, for readers that map them."""
    data = serialize(sample())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in sample().items():
        if name in header:
            assert header[name]["data_offsets"][0] % tensor.element_size() == 0


@settings(deadline=None)
@given(st.permutations(list(sample())))
def test_order_does_not_matter_to_the_bytes(names: list[str]) -> None:
    """The same tensors in another order, tied or not, are written as the same bytes."""
    torch.manual_seed(0)
    state = sample()
    metadata = {"b": "2", "a": "1"}
    expected = serialize(state, metadata=metadata)
    again = {name: state[name] for name in names}
    assert serialize(again, metadata=dict(reversed(metadata.items()))) == expected
    assert spec_digest(spec_of(again)) == spec_digest(reversed(spec_of(state)))


@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_cannot_be_written_is_refused() -> None:
    """Nothing, sparse or meta tensors, odd dtypes, bad names and the reserved key raise InvalidInputError."""
    cases: list[dict[str, Tensor]] = [
        {},
        {"w": torch.eye(3).to_sparse()},
        {"w": torch.empty(3, device="meta")},
        {"w": torch.ones(3, dtype=torch.complex128)},
        {"../w": torch.ones(3)},
    ]
    for state in cases:
        with pytest.raises(InvalidInputError):
            serialize(state)
    with pytest.raises(InvalidInputError, match="'tied' free"):
        serialize({"w": torch.ones(1)}, metadata={"tied": "{}"})


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2, torch.complex64]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_found(dtype: torch.dtype, bad: float) -> None:
    """59: NaN and infinity are found in every floating dtype, with the tensor's name and how many there are."""
    sound = {"a": torch.ones(3), "n": torch.tensor(1)}
    check_finite(sound)
    with pytest.raises(CorruptError, match="'w' has 2 of 4") as caught:
        check_finite({**sound, "w": torch.tensor([1.0, bad, 2.0, bad]).to(dtype)})
    assert caught.value.code == "not_finite"


@settings(max_examples=60, deadline=None)
@given(
    position=st.integers(0, 99_999),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    is_strided=st.booleans(),
)
def test_one_bad_value_anywhere_is_found(
    *, position: int, bad: float, dtype: torch.dtype, is_strided: bool
) -> None:
    """59: a single NaN or infinity among 100,000 values is found wherever it stands."""
    values = torch.zeros(100_000, dtype=dtype)
    values[position] = bad
    with pytest.raises(CorruptError, match="has 1 of 100000"):
        check_finite({"w": values.reshape(400, 250).t() if is_strided else values})
