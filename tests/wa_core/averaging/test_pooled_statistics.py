"""BatchNorm statistics in both folds: the moments of the mixture, against brute force in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wa_core.averaging.files.bytes_writer import BytesWriter
from wa_core.averaging.files.passes import Pace
from wa_core.averaging.files.sources import open_object
from wa_core.averaging.rules import EmaRule, PowerEmaRule, Rule, SwaRule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.averaging.streamed_shadow import StreamedShadow
from wa_core.averaging.streaming import fold_source
from wa_core.errors import IncompatibleError
from wa_core.store.memory import MemoryStore
from wa_core.tensors import read_checkpoint, serialize

RULES: list[Rule] = [
    SwaRule(),
    SwaRule(start_step=40),
    EmaRule(half_life_steps=60),
    EmaRule(decay=0.9, init="first"),
    PowerEmaRule(sigma_rel=0.2),
]
DTYPES = ["float32", "float64"]


def statistics(step: int, *, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights and two pairs of statistics whose means move by about `spread` from step to step."""
    draw = torch.Generator().manual_seed(step)
    return {
        "a.weight": torch.randn(7, generator=draw).to(dtype),
        "a.running_mean": (spread * torch.randn(7, generator=draw)).to(dtype),
        "a.running_var": torch.rand(7, generator=draw).to(dtype),
        "running_mean": (spread * torch.randn(3, generator=draw)).to(dtype),
        "running_var": torch.rand(3, generator=draw).to(dtype),
        "a.num_batches_tracked": torch.tensor(step),
    }


def streamed(shadow: StreamedShadow, state: dict[str, Tensor], *, step: int, **how: Any) -> None:
    """Fold a state from a store in memory."""
    store = MemoryStore()
    store.put("m.safetensors", serialize(state))
    fold_source(open_object(store, "m.safetensors"), [shadow], step=step, **how)


def value_of(shadow: StreamedShadow | ShadowWeights) -> dict[str, Tensor]:
    """The average."""
    if isinstance(shadow, ShadowWeights):
        return shadow.value()
    writer = BytesWriter()
    shadow.write_value(writer, metadata={})
    return read_checkpoint([writer.body]).tensors


def mixture(states: dict[int, dict[str, Tensor]], shares: dict[int, float], prefix: str) -> tuple[Tensor, Tensor]:
    """Mean and variance of the mixture, from its first and second moments, in float64."""
    parts = torch.tensor([shares[step] for step in states], dtype=torch.float64)
    means = torch.stack([state[f"{prefix}running_mean"].double() for state in states.values()])
    variances = torch.stack([state[f"{prefix}running_var"].double() for state in states.values()])
    mean = parts @ means
    return mean, parts @ variances + parts @ (means - mean) ** 2


@settings(deadline=None)
@given(
    rule=st.sampled_from(RULES),
    dtype=st.sampled_from(DTYPES),
    steps=st.sets(st.integers(40, 5_000), min_size=1, max_size=9).map(sorted),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
)
def test_the_fold_gives_the_moments_of_the_mixture(
    rule: Rule, dtype: Any, steps: list[int], spread: float
) -> None:
    """Mean of means, mean of variances plus variance of means, for every rule and in both folds."""
    states = {step: statistics(step, spread=spread) for step in steps}
    shadow, other = ShadowWeights(rule, dtype=getattr(torch, dtype)), StreamedShadow(rule, dtype=dtype)
    for step, state in states.items():
        shadow.fold(state, step=step)
        streamed(other, state, step=step)

    found = value_of(shadow)
    assert serialize(value_of(other)) == serialize(found)
    # A fold's weight is rounded to the accumulator's dtype, too.
    near = 1e-6 if dtype == "float32" else 1e-14
    for prefix in ("", "a."):
        mean, variance = mixture(states, shadow.coefficients(), prefix)
        found_mean, found_variance = (found[prefix + name].double() for name in ("running_mean", "running_var"))
        assert torch.allclose(found_mean, mean, rtol=1e-6, atol=near * spread)
        assert torch.allclose(found_variance, variance, rtol=1e-6, atol=near * (1 + spread**2))
        assert (found[f"{prefix}running_var"] >= 0).all()


@pytest.mark.parametrize("kind", [ShadowWeights, StreamedShadow])
def test_float64_accumulators_keep_the_variance_to_float32s_last_place(kind: Any) -> None:
    """200 folds of SWA give the mixture's moments, rounded once."""
    states = {step: statistics(step, spread=5.0) for step in range(200)}
    shadow = kind(SwaRule(), dtype="float64" if kind is StreamedShadow else torch.float64)
    for step, state in states.items():
        if isinstance(shadow, ShadowWeights):
            shadow.fold(state, step=step)
        else:
            streamed(shadow, state, step=step)
    mean, variance = mixture(states, dict.fromkeys(states, 1 / 200), "a.")
    found = value_of(shadow)
    assert torch.allclose(found["a.running_mean"].double(), mean, rtol=1e-7, atol=1e-9)
    assert torch.allclose(found["a.running_var"].double(), variance, rtol=1e-7, atol=0)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.spelling)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpoint_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_constant_statistics_stay_exactly_constant(rule: Rule, dtype: Any, checkpoint_dtype: torch.dtype) -> None:
    """Statistics that never change come out bit for bit the same after every fold."""
    state = statistics(1, spread=1000, dtype=checkpoint_dtype) | {"a.num_batches_tracked": torch.tensor(3)}
    shadow, other = ShadowWeights(rule, dtype=getattr(torch, dtype)), StreamedShadow(rule, dtype=dtype)
    for step in range(40, 70):
        shadow.fold(state, step=step)
        streamed(other, state, step=step)
        assert serialize(shadow.value()) == serialize(state)
    assert serialize(value_of(other)) == serialize(state)


def test_patterns_of_latest_tensors_outlive_a_restart() -> None:
    """Tensors that match keep their newest value, the pair with them, and the kept state goes on so."""
    patterns = ("a.running_var", "*.weight")
    shadow = ShadowWeights(SwaRule(), dtype=torch.float64, latest=patterns)
    other = StreamedShadow(SwaRule(), dtype="float64", latest=patterns)
    for step in (1, 2, 3):
        shadow.fold(statistics(step), step=step)
        streamed(other, statistics(step), step=step, pace=Pace(16))
        tensors, metadata = shadow.state()
        writer = BytesWriter()
        other.write_state(writer)
        assert read_checkpoint([writer.body]).metadata["shadow"] == metadata["shadow"]
        store = MemoryStore()
        store.put("s.safetensors", writer.body)
        shadow = ShadowWeights.restore(SwaRule(), tensors, metadata)
        other = StreamedShadow.restore(SwaRule(), open_object(store, "s.safetensors"))
    newest = statistics(3)
    for found in (value_of(shadow), value_of(other)):
        for name in ("a.weight", "a.running_mean", "a.running_var"):
            assert torch.equal(found[name], newest[name])
        assert not torch.equal(found["running_mean"], newest["running_mean"])
    assert serialize(value_of(other)) == serialize(value_of(shadow))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"running_var": torch.ones(1)}, "shape_changed"),
        ({"running_var": torch.ones(3, dtype=torch.int32)}, "shape_changed"),
        ({"q.weight": torch.ones(3, dtype=torch.int8), "q.SCB": torch.ones(1)}, "unsupported_dtype"),
        ({"z": torch.ones(3, dtype=torch.complex64)}, "unsupported_dtype"),
    ],
)
def test_what_has_no_average_is_refused_by_both_folds(change: dict[str, Tensor], code: str) -> None:
    """Pairs of different shapes or kinds, quantised and complex tensors are refused before anything changes."""
    state = statistics(1) | change
    shadow, other = ShadowWeights(SwaRule()), StreamedShadow(SwaRule())
    for refused in (lambda: shadow.fold(state, step=1), lambda: streamed(other, state, step=1)):
        with pytest.raises(IncompatibleError) as caught:
            refused()
        assert caught.value.code == code
    shadow.fold(statistics(2), step=2)
    streamed(other, statistics(2), step=2)
    assert serialize(value_of(other)) == serialize(shadow.value()) == serialize(statistics(2))
