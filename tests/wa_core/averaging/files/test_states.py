"""Shadow states summed from checkpoints and states, against float64 brute force, and folded on."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.checkpoints import network
from wa_core.averaging.files.bytes_writer import BytesWriter
from wa_core.averaging.files.output import SafetensorsWriter
from wa_core.averaging.files.sources import open_object
from wa_core.averaging.files.states import sum_states
from wa_core.averaging.rules import EmaRule, SwaRule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.averaging.streamed_shadow import StreamedShadow
from wa_core.averaging.streaming import fold_source
from wa_core.errors import CorruptError, IncompatibleError, InvalidInputError
from wa_core.store.memory import MemoryStore
from wa_core.tensors import read_checkpoint, serialize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from support.seaweed import Seaweed
    from wa_core.averaging.files.sources import FilesSource
    from wa_core.averaging.rules import Rule
    from wa_core.store.base import ObjectStore

EMA = EmaRule(half_life_steps=60)
STATISTICS = ("bn.running_mean", "bn.running_var")


def put(store: ObjectStore, name: str, body: bytes) -> FilesSource:
    """An object, open."""
    store.put(name, body)
    return open_object(store, name)


def state_of(
    rule: Rule, states: Mapping[int, Mapping[str, Tensor]], *, dtype: torch.dtype = torch.float64
) -> bytes:
    """The state of a shadow that has folded these."""
    shadow = ShadowWeights(rule, dtype=dtype)
    for step, state in states.items():
        shadow.fold(state, step=step)
    tensors, metadata = shadow.state()
    return serialize(tensors, metadata=metadata)


def summed(parts: Sequence[tuple[FilesSource, float]], **how: object) -> bytes:
    """The state that is written."""
    writer = BytesWriter()
    options = {"rule": EMA, "dtype": "float64", "coefficients": {40: 1.0}} | how
    sum_states(parts, writer, **options)  # type: ignore[arg-type]
    return writer.body


def exact(states: Mapping[int, Mapping[str, Tensor]], coefficients: Mapping[int, float]) -> dict[str, Tensor]:
    """The weighted sum of checkpoints in float64; statistics are those of the mixture."""
    first = next(iter(states.values()))
    found = {
        name: sum((part * states[step][name].double() for step, part in coefficients.items()), torch.zeros(()))
        for name, tensor in first.items()
        if tensor.is_floating_point()
    }
    mean = found["bn.running_mean"]
    found["bn.running_var"] = sum(
        (
            part
            * (states[step]["bn.running_var"].double() + (states[step]["bn.running_mean"].double() - mean) ** 2)
            for step, part in coefficients.items()
        ),
        torch.zeros(()),
    ).clamp(min=0)
    return found


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, ulps: float) -> None:
    """Within so many units in the last place of the largest magnitude."""
    for name, tensor in expected.items():
        kind = np.float64 if found[name].dtype == torch.float64 else np.float32
        ulp = float(np.spacing(kind(tensor.abs().max() if tensor.numel() else 1)))
        error = (found[name].double() - tensor).abs().max() if tensor.numel() else 0
        assert error <= ulps * ulp, name


@pytest.mark.parametrize("checkpoint_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_checkpoints_and_states_are_summed_as_their_checkpoints(dtype: str, checkpoint_dtype: torch.dtype) -> None:
    """What is written is the weighted sum over checkpoints, rounded once, with weights below zero too."""
    states = {step: network(step, dtype=checkpoint_dtype) for step in (10, 20, 30, 40)}
    store = MemoryStore()
    swa = ShadowWeights(SwaRule(), dtype=torch.float64)
    for step in (10, 20, 30):
        swa.fold(states[step], step=step)
    parts = [
        (put(store, "swa", state_of(SwaRule(), {step: states[step] for step in (10, 20, 30)})), 1.5),
        (put(store, "30", serialize(states[30])), -1.0),
        (put(store, "40", serialize(states[40])), 0.5),
    ]
    coefficients = {10: 0.5, 20: 0.5, 30: -0.5, 40: 0.5}

    body = summed(parts, dtype=dtype, coefficients=coefficients)

    found = read_checkpoint([body])
    wide = torch.float64 if "float64" in (dtype, str(checkpoint_dtype).removeprefix("torch.")) else torch.float32
    assert {tensor.dtype for tensor in found.tensors.values() if tensor.is_floating_point()} == {wide}
    assert_close(found.tensors, exact(states, coefficients), ulps=64 if wide == torch.float64 else 1)
    assert found.tensors["bn.num_batches_tracked"] == 40
    assert torch.equal(found.tensors["mask"], states[40]["mask"])


@pytest.mark.parametrize("rule", [EMA, SwaRule(), EmaRule(decay=0.9)])
def test_folding_goes_on_from_a_sum(tmp_path: Path, rule: Rule) -> None:
    """Both shadows take the state; with more folds they hold the sum over all checkpoints, to the same bits."""
    states = {step: network(step) for step in (10, 20, 30, 40, 50)}
    store = MemoryStore()
    before = {10: 0.25, 20: 0.25, 30: 0.5}
    older = put(store, "old", state_of(SwaRule(), {10: states[10], 20: states[20]}))
    body = summed([(older, 0.5), (put(store, "30", serialize(states[30])), 0.5)], rule=rule, coefficients=before)

    with closing(put(store, "state", body)) as source:
        streamed = StreamedShadow.restore(rule, source)
    read = read_checkpoint([body])
    whole = ShadowWeights.restore(rule, read.tensors, read.metadata)
    for step in (40, 50):
        fold_source(put(store, str(step), serialize(states[step])), [streamed], step=step)
        whole.fold(states[step], step=step)

    weights = [
        rule.weight(n_averaged=n, step=step, prev_step=prev) for n, step, prev in ((3, 40, 30), (4, 50, 40))
    ]
    left = (1 - weights[0]) * (1 - weights[1])
    expected = {step: part * left for step, part in before.items()}
    expected |= {40: weights[0] * (1 - weights[1]), 50: weights[1]}
    assert streamed.coefficients() == pytest.approx(expected, abs=1e-15)
    assert whole.coefficients() == streamed.coefficients()
    path = tmp_path / "value.safetensors"
    streamed.write_value(SafetensorsWriter(path), metadata={})
    value = read_checkpoint([path.read_bytes()]).tensors
    assert serialize(value) == serialize(whole.value())
    assert_close(value, exact(states, expected), ulps=1)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5), st.integers(0, 2**20))
def test_statistics_of_any_sum_are_those_of_the_mixture(weights: list[float], seed: int) -> None:
    """However states are nested, means and variances are the mixture's; a variance is never below zero."""
    weights[-1] = 1.0 - sum(weights[:-1])
    states = {10 * n: network(seed + n, size=3) for n in range(len(weights) + 2)}
    inner = put(MemoryStore(), "inner", state_of(SwaRule(), {step: states[step] for step in list(states)[:3]}))
    singles = [put(MemoryStore(), str(n), serialize(states[10 * (n + 2)])) for n in range(1, len(weights))]

    body = summed([(source, weight) for source, weight in zip([inner, *singles], weights, strict=True)])

    coefficients = dict.fromkeys(list(states)[:3], weights[0] / 3)
    for n, weight in enumerate(weights[1:], start=1):
        coefficients[10 * (n + 2)] = coefficients.get(10 * (n + 2), 0.0) + weight
    found, expected = read_checkpoint([body]).tensors, exact(states, coefficients)
    for name in STATISTICS:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-9, atol=1e-9)
    assert bool((found["bn.running_var"] >= 0).all())


def test_tied_tensors_are_summed_once(tmp_path: Path) -> None:
    """A state has a tied tensor once, and the value written from it has it under both names again."""
    shared = torch.arange(6.0)
    tied = {"embed": shared, "head": shared}
    store = MemoryStore()
    parts = [(put(store, "state", state_of(SwaRule(), {10: tied})), 0.5), (put(store, "20", serialize(tied)), 0.5)]

    body = summed(parts, coefficients={10: 0.5, 20: 0.5})

    assert read_checkpoint([body]).tensors.keys() == {"embed"}
    with closing(put(store, "sum", body)) as source:
        shadow = StreamedShadow.restore(EMA, source)
    shadow.write_value(SafetensorsWriter(tmp_path / "value.safetensors"), metadata={})
    value = read_checkpoint([(tmp_path / "value.safetensors").read_bytes()]).tensors
    assert serialize(value) == serialize(tied)


def test_whole_numbers_come_from_the_last_part_whatever_it_weighs() -> None:
    """A part of weight 0 adds nothing but what is not averaged."""
    store = MemoryStore()
    parts = [(put(store, "10", serialize(network(10))), 1.0), (put(store, "20", serialize(network(20))), 0.0)]

    found = read_checkpoint([summed(parts)]).tensors

    assert torch.equal(found["big"], network(10)["big"].double())
    assert found["bn.num_batches_tracked"] == 20


def test_a_real_store_gives_the_same_bits(seaweed: Seaweed, tmp_path: Path) -> None:
    """From SeaweedFS to a file on disk, with digests checked on the way: the bytes of a sum in memory."""
    states = {step: network(step, size=50_001) for step in (10, 20, 30)}
    bodies = {"state": state_of(SwaRule(), {10: states[10], 20: states[20]}), "30": serialize(states[30])}
    weights = {"state": 0.6, "30": 0.4}
    store, memory = seaweed.new_store(), MemoryStore()
    seen: list[tuple[int, int]] = []

    sum_states(
        [(put(store, name, body), weights[name]) for name, body in bodies.items()],
        SafetensorsWriter(tmp_path / "state.safetensors"),
        rule=EMA,
        dtype="float32",
        coefficients={10: 0.3, 20: 0.3, 30: 0.4},
        on_progress=lambda done, total: seen.append((done, total)),
    )

    kept = [(put(memory, name, body), weights[name]) for name, body in bodies.items()]
    expected = summed(kept, dtype="float32", coefficients={10: 0.3, 20: 0.3, 30: 0.4})
    assert (
        read_checkpoint([(tmp_path / "state.safetensors").read_bytes()]).specs == read_checkpoint([expected]).specs
    )
    assert serialize(read_checkpoint([(tmp_path / "state.safetensors").read_bytes()]).tensors) == serialize(
        read_checkpoint([expected]).tensors
    )
    assert seen[-1][0] == seen[-1][1] > 0


def test_bad_parts_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    """Another architecture, another digest, NaN, no part, or a sum that overflows: named, and no file."""
    store, out = MemoryStore(), tmp_path / "state.safetensors"
    good = put(store, "good", serialize(network(10)))
    other = put(store, "other", serialize(network(20) | {"extra": torch.ones(1)}))
    store.put("changed", serialize(network(30)))
    changed = open_object(store, "changed", sha256="0" * 64)
    nan = put(store, "nan", serialize(network(40) | {"scalar": torch.tensor(float("nan"))}))
    large = put(store, "large", serialize(network(50) | {"scalar": torch.tensor(3e38)}))

    for parts, kind, code in (
        ([(good, 0.5), (other, 0.5)], IncompatibleError, "tensors_differ"),
        ([(good, 0.5), (changed, 0.5)], CorruptError, "digest_mismatch"),
        ([(good, 0.5), (nan, 0.5)], CorruptError, "not_finite"),
        ([(large, 9.0), (good, -8.0)], IncompatibleError, "overflow"),
        ([], InvalidInputError, "invalid_input"),
    ):
        with pytest.raises(kind) as caught:
            sum_states(parts, SafetensorsWriter(out), rule=EMA, dtype="float32", coefficients={10: 1.0})
        assert caught.value.code == code
        assert list(tmp_path.iterdir()) == []
