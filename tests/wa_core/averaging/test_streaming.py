"""The streaming fold against ShadowWeights, bit for bit."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.averaging import WatchedStore
from support.checkpoints import network, save
from support.faulty import Fault, FaultyStore
from support.folding import PIECEMEAL, RULES, fold, kept, written
from wa_core.averaging.files.bytes_writer import BytesWriter
from wa_core.averaging.files.output import SafetensorsWriter
from wa_core.averaging.files.passes import Pace
from wa_core.averaging.files.sources import open_object, open_source
from wa_core.averaging.files.stored import StoredTensor
from wa_core.averaging.rules import EmaRule, SwaRule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.averaging.streamed_shadow import StreamedShadow
from wa_core.averaging.streaming import fold_source
from wa_core.errors import (
    IncompatibleError,
)
from wa_core.specs import TensorSpec, format_dtype_name
from wa_core.store.memory import MemoryStore
from wa_core.tensors import read_checkpoint, serialize

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from support.seaweed import Seaweed
    from wa_core.averaging.rules import Rule


STEPS = [3, 20, 40, 41, 100]
TORCH = {"float32": torch.float32, "float64": torch.float64}


def value(shadow: StreamedShadow, folder: Path) -> dict[str, Tensor]:
    """The average that a shadow writes."""
    path = folder / "value.safetensors"
    shadow.write_value(SafetensorsWriter(path), metadata={"weights": "averaged"})
    return read_checkpoint([path.read_bytes()]).tensors


def assert_same(shadow: StreamedShadow, reference: ShadowWeights, folder: Path) -> None:
    """The same accumulators, coefficients and average, to the last bit."""
    found = read_checkpoint([kept(shadow, folder)])
    tensors, metadata = reference.state()
    assert serialize(found.tensors) == serialize(tensors)
    assert found.metadata["shadow"] == metadata["shadow"]
    assert shadow.coefficients() == reference.coefficients()
    assert serialize(value(shadow, folder)) == serialize(reference.value())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("checkpoint_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_in_file", [False, True])
def test_four_averages_have_the_bits_of_shadow_weights(
    tmp_path: Path, dtype: Any, checkpoint_dtype: torch.dtype, *, is_in_file: bool
) -> None:
    """One read folds a checkpoint into every average that counts it, with ShadowWeights' bits."""
    folder = tmp_path if is_in_file else None
    shadows = [StreamedShadow(rule, dtype=dtype, scratch_folder=folder) for rule in RULES]
    references = [ShadowWeights(rule, dtype=TORCH[dtype]) for rule in RULES]

    for step in STEPS:
        state = network(step, dtype=checkpoint_dtype)
        report = fold(shadows, state, step=step)
        assert report.is_folded == tuple(reference.fold(state, step=step) for reference in references)

    for shadow, reference in zip(shadows, references, strict=True):
        assert_same(shadow, reference, tmp_path)
        shadow.close()


@given(
    block=st.integers(1, 300),
    stretch=st.integers(16, 5000),
    connections=st.integers(1, 4),
    restarts=st.sets(st.sampled_from(STEPS)),
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from(["float32", "float64"]),
    checkpoint_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@settings(max_examples=40, deadline=None)
def test_bits_do_not_depend_on_blocks_connections_or_restarts(
    tmp_path_factory: pytest.TempPathFactory,
    block: int,
    stretch: int,
    connections: int,
    restarts: set[int],
    rule: Rule,
    dtype: Any,
    checkpoint_dtype: torch.dtype,
) -> None:
    """Any cut into blocks and requests, any number of connections, and restarts at any point: the same bits."""
    folder = tmp_path_factory.mktemp("fold")
    reference = ShadowWeights(rule, dtype=TORCH[dtype])
    shadow = StreamedShadow(rule, dtype=dtype)
    how = {"block": block, "pace": Pace(stretch, connections)}
    for step in STEPS:
        state = network(step, dtype=checkpoint_dtype, size=97)
        reference.fold(state, step=step)
        fold([shadow], state, step=step, **how)
        if step in restarts and shadow.n_averaged:
            kept(shadow, folder)
            shadow.close()
            source = open_source(folder / "state.safetensors")
            shadow = StreamedShadow.restore(rule, source, scratch_folder=folder)
            source.close()
    assert_same(shadow, reference, folder)
    shadow.close()


def laid_out(state: dict[str, Tensor], *, order: list[str], prefix: str, tied: bool) -> MemoryStore:
    """A store with the state as a file: tensors in this order, under wrappers' names, one perhaps twice."""
    tensors = []
    for name in order:
        dtype = str(state[name].dtype).removeprefix("torch.")
        spec = TensorSpec(prefix + name, dtype, tuple(state[name].shape))
        size_bytes = state[name].numel() * state[name].element_size()
        tensors.append(StoredTensor(spec, format_dtype_name(dtype), size_bytes))
    writer = BytesWriter()
    writer.begin(tensors, ties={f"{prefix}zz.tied": prefix + order[0]} if tied else {}, metadata={})
    for name in order:
        writer.write(prefix + name, 0, state[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    writer.commit({})
    store = MemoryStore()
    store.put("model.safetensors", writer.body)
    return store


@given(
    layouts=st.lists(
        st.tuples(
            st.permutations(sorted(network(0, size=29))), st.sampled_from(["", "module.", "_orig_mod.module."])
        ),
        min_size=len(STEPS),
        max_size=len(STEPS),
    ),
    rule=st.sampled_from(RULES),
    stretch=st.sampled_from([16, 100, 5000, 1 << 24]),
)
@settings(max_examples=25, deadline=None)
def test_bits_do_not_depend_on_file_order_or_prefixes(
    layouts: list[tuple[list[str], str]], rule: Rule, stretch: int
) -> None:
    """However each file orders its tensors and whatever wrapped the model then: the bits of ShadowWeights."""
    reference, shadow = ShadowWeights(rule), StreamedShadow(rule)
    for step, (order, prefix) in zip(STEPS, layouts, strict=True):
        state = network(step, size=29)
        reference.fold(state, step=step)
        source = open_object(laid_out(state, order=order, prefix=prefix, tied=False), "model.safetensors")
        fold_source(source, [shadow], step=step, pace=Pace(stretch))
    assert serialize(written(shadow)) == serialize(reference.value())


@given(
    order=st.permutations(sorted(network(0, size=29))),
    prefix=st.sampled_from(["", "module."]),
    stretch=st.sampled_from([16, 5000, 1 << 24]),
)
@settings(max_examples=25, deadline=None)
def test_a_tie_counts_once_wherever_it_lies(order: list[str], prefix: str, stretch: int) -> None:
    """A tensor with a second name has one accumulator, and both names come back with its average."""
    shadow, reference = StreamedShadow(SwaRule()), ShadowWeights(SwaRule())
    for step in STEPS:
        state = network(step, size=29)
        reference.fold({**state, "zz.tied": state[order[0]]}, step=step)
        source = open_object(laid_out(state, order=order, prefix=prefix, tied=True), "model.safetensors")
        fold_source(source, [shadow], step=step, pace=Pace(stretch))
    found = written(shadow)
    assert len(list(shadow.slots())) == len(order)
    assert torch.equal(found["zz.tied"], found[order[0]])
    assert serialize(found) == serialize(reference.value())


def test_either_shadow_goes_on_from_the_others_state(tmp_path: Path) -> None:
    """What ShadowWeights kept is restored into a streamed shadow and the other way round."""
    rule = EmaRule(half_life_steps=60)
    reference = ShadowWeights(rule)
    reference.fold(network(3), step=3)
    tensors, metadata = reference.state()
    path = tmp_path / "shadow.safetensors"
    path.write_bytes(serialize(tensors, metadata=metadata))

    source = open_source(path)
    shadow = StreamedShadow.restore(rule, source)
    source.close()
    fold([shadow], network(20), step=20)
    reference.fold(network(20), step=20)
    assert_same(shadow, reference, tmp_path)

    found = read_checkpoint([kept(shadow, tmp_path)])
    back = ShadowWeights.restore(rule, found.tensors, found.metadata)
    assert serialize(back.value()) == serialize(reference.value())


def test_ties_are_folded_once_and_written_back(tmp_path: Path) -> None:
    """Tied tensors have one accumulator; a copy that lost the tie is folded while its values are the same."""
    shared = torch.randn(50)
    shadow = StreamedShadow(SwaRule())
    fold([shadow], {"head": shared, "embed": shared}, step=1)
    assert [slot.name for slot in shadow.slots()] == ["embed"]
    fold([shadow], {"head": shared + 1, "embed": shared + 1}, step=2)

    found = value(shadow, tmp_path)
    assert found["head"] is found["embed"]
    with pytest.raises(IncompatibleError) as caught:
        fold([shadow], {"head": shared, "embed": shared + 1}, step=3)
    assert caught.value.code == "ties_changed"
    assert not shadow.is_broken
    assert shadow.n_averaged == 2


def test_every_byte_is_read_once_from_a_real_store(seaweed: Seaweed, tmp_path: Path) -> None:
    """Three averages, one read: the store sends the object's size and no byte more; the digest comes with it."""
    state = {"w": torch.randn(300_001), "b": torch.randn(1000).bfloat16(), "n": torch.tensor(3)}
    body = serialize(state)
    store = WatchedStore(seaweed.new_store())
    store.put("ck/model.safetensors", body)
    shadows = [StreamedShadow(rule, scratch_folder=tmp_path) for rule in RULES[:3]]

    source = open_object(store, "ck/model.safetensors", size_bytes=len(body))
    report = fold_source(source, shadows, step=1, digests=True, pace=Pace(100_000))

    assert store.bytes_read == {"ck/model.safetensors": len(body)}
    assert report.sha256 == {"model.safetensors": hashlib.sha256(body).hexdigest()}
    for shadow in shadows:
        assert serialize(value(shadow, tmp_path)) == serialize(state)
        shadow.close()


def test_nothing_is_read_when_no_rule_counts_the_step() -> None:
    """A checkpoint before every start costs no byte."""
    store = WatchedStore(MemoryStore())
    store.put("m.safetensors", serialize(network(1)))
    source = open_object(store, "m.safetensors")
    before = dict(store.bytes_read)
    report = fold_source(source, [StreamedShadow(SwaRule(start_step=9))], step=1)
    assert report.is_folded == (False,)
    assert store.bytes_read == before


class StopError(Exception):
    """Raised by the caller of a fold to end it."""


@pytest.mark.parametrize("pace", [Pace(), PIECEMEAL])
def test_whoever_is_told_of_every_stretch_can_stop_the_fold(pace: Pace) -> None:
    """`on_read` sees all bytes; what it raises passes through, and only a large checkpoint breaks by it."""
    state = network(1)
    shadow, told = StreamedShadow(SwaRule()), []
    report = fold([shadow], state, step=1, on_read=told.append, pace=pace)
    assert sum(told) == report.read_bytes
    assert (len(told) > 1) == (pace is PIECEMEAL)

    def stop(_: int) -> None:
        raise StopError

    with pytest.raises(StopError):
        fold([shadow], state, step=2, on_read=stop, pace=pace)
    assert shadow.is_broken == (pace is PIECEMEAL)
    assert shadow.n_averaged == 1


def test_bits_of_zeros_do_not_depend_on_where_a_block_ends() -> None:
    """A weight that rounds to 1 replaces the average, signs of zeros included, in any cut and in both classes."""
    rule = EmaRule(half_life_steps=60)
    weight = rule.weight(n_averaged=1, step=1454, prev_step=40)
    assert weight < 1.0
    assert torch.tensor(weight) == 1.0
    states = {
        40: {"w": torch.tensor([0.0, -0.0] * 17 + [1.0]), "b": torch.zeros(3), "x": torch.ones(2).double()},
        1454: {"w": torch.tensor([0.0, 0.0, -0.0, -0.0] * 8 + [0.0, -0.0, 0.0]), "b": -torch.zeros(3)}
        | {"x": torch.zeros(2).double()},
    }
    for block in (1, 7, 16, 17, 1000):
        reference, shadow = ShadowWeights(rule), StreamedShadow(rule)
        for step, state in states.items():
            reference.fold(state, step=step)
            fold([shadow], state, step=step, block=block)
        assert serialize(written(shadow)) == serialize(reference.value())
        assert torch.equal(torch.signbit(written(shadow)["w"]), torch.signbit(states[1454]["w"]))
        assert (written(shadow)["x"] > 0).all()  # float64 has the digits


def test_large_numbers_are_not_taken_for_infinity(tmp_path: Path) -> None:
    """Values near the end of float32's range, whose sum overflows, are folded."""
    state = {"w": torch.full((1000,), 3e38)}
    shadow = StreamedShadow(SwaRule())
    fold([shadow], state, step=1)
    assert serialize(value(shadow, tmp_path)) == serialize(state)


def test_f6_a_read_that_is_cut_goes_on_where_it_was_cut() -> None:
    """F6: one broken connection costs a request, and no byte is read twice."""
    store = FaultyStore(MemoryStore())
    store.put("m.safetensors", serialize(network(1, size=50_000)))
    source = open_object(store, "m.safetensors")
    shadow, reference = StreamedShadow(SwaRule()), ShadowWeights(SwaRule())
    store.next_call("stream", Fault.TRUNCATE)
    fold_source(source, [shadow], step=1)
    reference.fold(network(1, size=50_000), step=1)
    assert serialize(written(shadow)) == serialize(reference.value())


_MEASURED = """
import sys
from pathlib import Path
import torch
from wa_core.averaging.rules import SwaRule
from wa_core.averaging.files.sources import open_source
from wa_core.averaging.streamed_shadow import StreamedShadow
from wa_core.averaging.streaming import fold_source
def rss_mb(which):
    line = next(line for line in open("/proc/self/status") if line.startswith(which))
    return int(line.split()[1]) // 1024
torch.ones(1 << 20).lerp_(torch.ones(1 << 20), 0.5)
before = rss_mb("VmHWM")
shadows = [StreamedShadow(SwaRule(), scratch_folder=Path(sys.argv[1])) for _ in range(2)]
for step, path in enumerate(sys.argv[2:]):
    source = open_source(path)
    fold_source(source, shadows, step=step)
    source.close()
print(rss_mb("VmHWM") - before)
"""


def test_memory_is_bounded_by_blocks_with_a_scratch_file(tmp_path: Path) -> None:
    """F23: folding 320 MB files into two averages on disk takes less than 120 MB on top of torch itself."""
    paths = save(tmp_path, {step: {"w": torch.full((80_000_000,), float(step))} for step in (1, 2)})
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, tmp_path, *paths],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert int(done.stdout) < 120
