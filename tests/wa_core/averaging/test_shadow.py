"""Shadow weights against brute force in float64, and against the coefficients they report."""

from __future__ import annotations

import math
import random
from decimal import Context, Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from support.shadows import STEPS, assert_same_bits, folded, state_at
from wa_core.averaging.rules import EmaRule, Rule, SwaRule, parse_rule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.errors import (
    CorruptError,
    IncompatibleError,
)
from wa_core.tensors import read_checkpoint, serialize

RULES: list[Rule] = [
    SwaRule(),
    EmaRule(half_life_steps=60),
    EmaRule(decay=0.9),
    EmaRule(decay=0.9, init="first"),
    SwaRule(start_step=40),
]
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.spelling)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 6e-8)])
def test_the_value_is_the_weighted_sum_that_the_coefficients_say(
    rule: Rule, dtype: torch.dtype, tolerance: float
) -> None:
    """The average equals the float64 sum of coefficient times checkpoint, brute force."""
    shadow = folded(rule, STEPS, dtype=dtype)
    coefficients = shadow.coefficients()

    for name, found in shadow.value().items():
        if found.is_floating_point():
            expected = sum(value * state_at(step)[name].double() for step, value in coefficients.items())
            assert torch.allclose(found.double(), torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def test_float64_accumulators_round_once() -> None:
    """SWA in float64 differs from the float64 mean by at most half a unit in the last place of float32."""
    checkpoints = [state_at(step, size=400_001)["big"] for step in STEPS]
    shadow = ShadowWeights(SwaRule(), dtype=torch.float64)
    for step, checkpoint in enumerate(checkpoints):
        shadow.fold({"big": checkpoint}, step=step)
    found = shadow.value()["big"]
    mean = torch.stack(checkpoints).double().mean(0)
    ulp = torch.nextafter(mean.float().abs(), torch.tensor(math.inf)) - mean.float().abs()
    assert ((found.double() - mean).abs() <= 0.5001 * ulp.double()).all()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.spelling)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", [STEPS, list(range(20, 820, 20))], ids=["irregular", "regular"])
def test_one_hot_checkpoints_average_to_their_coefficients(
    rule: Rule, dtype: torch.dtype, steps: list[int]
) -> None:
    """When the parameter at step t is the unit vector e_t, the average is its coefficient vector."""
    counted = [step for step in steps if rule.counts(step)]
    shadow = ShadowWeights(rule, dtype=dtype)
    for step in steps:
        one_hot = torch.tensor([float(step == other) for other in counted], dtype=dtype)
        shadow.fold({"w": one_hot}, step=step)

    found = shadow.value()["w"].tolist()

    assert found == pytest.approx(list(shadow.coefficients().values()), rel=1e-5, abs=1e-7)
    assert math.fsum(found) == pytest.approx(1.0, abs=1e-6)
    if isinstance(rule, SwaRule):
        assert found == pytest.approx([1 / len(counted)] * len(counted), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ema_matches_torch_averaged_model(dtype: torch.dtype) -> None:
    """With init=first and a decay per fold the average is that of torch.optim.swa_utils."""
    model = nn.Linear(7, 5)
    reference = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    shadow = ShadowWeights(EmaRule(decay=0.9, init="first"), dtype=dtype)
    for step in range(1, 30):
        nn.init.normal_(model.weight)
        reference.update_parameters(model)
        shadow.fold(model.state_dict(), step=step)
    assert torch.allclose(shadow.value()["weight"], reference.module.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.spelling)
@pytest.mark.parametrize("checkpoint_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constants_stay_exactly_constant(rule: Rule, checkpoint_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """A value that never changes comes out bit for bit the same after every fold."""
    state = state_at(1, dtype=checkpoint_dtype)
    shadow = ShadowWeights(rule, dtype=dtype)
    for step in range(40, 90):
        shadow.fold(state, step=step)
        assert_same_bits(shadow.value(), state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_checkpoints_are_averaged_in_high_precision(dtype: torch.dtype) -> None:
    """bfloat16 checkpoints give the bfloat16 rounding of their exact mean; a bfloat16 shadow would be stuck."""
    shadow = ShadowWeights(EmaRule(decay=0.999, init="first"), dtype=dtype)
    shadow.fold({"w": torch.zeros(3, dtype=torch.bfloat16)}, step=0)
    for step in range(1, 2000):
        shadow.fold({"w": torch.ones(3, dtype=torch.bfloat16)}, step=step)
    found = shadow.value()["w"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.full((3,), 1 - 0.999**1999).bfloat16())


def in_float32_ulps(found: Tensor, exact: list[Decimal]) -> float:
    """The largest distance from the exact values, in units in the last place of the exact value as a float32."""
    distances = []
    for one, other in zip(found.tolist(), exact, strict=True):
        near = torch.tensor(abs(float(other)), dtype=torch.float32)
        ulp = float(torch.nextafter(near, torch.tensor(math.inf)) - near)
        distances.append(abs(Decimal(one) - other) / Decimal(ulp))
    return float(max(distances))


def test_20_000_folds_of_swa_stay_within_one_ulp_of_the_exact_mean() -> None:
    """The float64 accumulator's mean of 20,000 values, known exactly from integers, is off by at most one ulp."""
    n, moduli = 20_000, torch.tensor([7, 1_009, 65_537, 1_000_003])
    offsets = torch.tensor([0, 4_000_000, -5_000_000, 1])
    shadow, total = ShadowWeights(SwaRule(), dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    for step in range(n):
        # Integers below 2**24 over 2**10: float32 holds each exactly.
        value = step * 7_919 % moduli + offsets
        total += value
        shadow.fold({"w": value.float() / 1024}, step=step)
    with localcontext(Context(prec=60)):
        exact = [Decimal(number) / 1024 / n for number in total.tolist()]
        assert in_float32_ulps(shadow.value()["w"], exact) <= 1.0
        assert in_float32_ulps(shadow.state()[0]["w"], exact) <= 1e-5


@pytest.mark.parametrize("n", [2, 1_000, 20_000])
def test_an_ema_of_decay_0_99999_stays_within_one_ulp_of_its_closed_form(n: int) -> None:
    """Values a + b i average to a + b (n - age) with the mean age d/(1-d) - n d^n/(1-d^n)."""
    start, slope = torch.tensor([0.0, 100.0, -3.0]), torch.tensor([2.0**-14, 2.0**-10, 0.5])
    rule = EmaRule(decay=0.99999)
    shadow = ShadowWeights(rule, dtype=torch.float64)
    for step in range(1, n + 1):
        shadow.fold({"w": start + slope * step}, step=step)
    with localcontext(Context(prec=60)):
        decay = Decimal(rule.decay or 0)
        age = decay / (1 - decay) - n * decay**n / (1 - decay**n)
        exact = [Decimal(a) + Decimal(b) * (n - age) for a, b in zip(start.tolist(), slope.tolist(), strict=True)]
        assert in_float32_ulps(shadow.value()["w"], exact) <= 1.0
        assert in_float32_ulps(shadow.state()[0]["w"], exact) <= 1e-4


@pytest.mark.parametrize("rule", [SwaRule(), EmaRule(decay=0.999)], ids=lambda rule: rule.spelling)
@pytest.mark.parametrize("checkpoint_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_precision_inputs_are_rounded_once(
    rule: Rule, checkpoint_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """500 bfloat16 or float16 checkpoints give their exact average within one rounding, half an ulp."""
    draw = torch.Generator().manual_seed(0)
    shadow, seen = ShadowWeights(rule, dtype=dtype), []
    for step in range(500):
        value = (torch.randn(4_000, generator=draw) + 3).to(checkpoint_dtype)
        shadow.fold({"w": value}, step=step)
        seen.append(value.double())
    coefficients = torch.tensor(list(shadow.coefficients().values()), dtype=torch.float64)
    exact = coefficients @ torch.stack(seen)
    found = shadow.value()["w"]
    near = exact.to(checkpoint_dtype).abs()
    ulp = torch.nextafter(near, torch.full_like(near, math.inf)).double() - near.double()
    assert ((found.double() - exact).abs() <= (0.5 + 0.01) * ulp).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_values_whose_sum_overflows_are_folded(dtype: torch.dtype) -> None:
    """Only NaN and infinity are refused, not values that are merely huge."""
    shadow = ShadowWeights(SwaRule(), dtype=dtype)
    for step in range(3):
        shadow.fold({"w": torch.full((5,), 3e38)}, step=step)
    assert torch.equal(shadow.value()["w"], torch.full((5,), 3e38))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 3_000_000, -1])
def test_one_bad_value_among_millions_is_found(bad: float, index: int) -> None:
    """Wherever it is, and even where infinities of both signs meet in a sum."""
    shadow = ShadowWeights(SwaRule())
    values = torch.zeros(3_000_001)
    values[index] = bad
    for state in ({"w": values}, {"w": torch.stack([values, -values])}):
        with pytest.raises(CorruptError, match="NaN or infinite"):
            shadow.fold(state, step=1)
    assert shadow.n_averaged == 0


def test_integers_and_bools_take_the_latest_value() -> None:
    """Counters and masks are not averaged."""
    value = folded(SwaRule(), STEPS, dtype=torch.float32).value()
    assert value["bn.num_batches_tracked"].item() == STEPS[-1]
    assert torch.equal(value["mask"], state_at(STEPS[-1])["mask"])


def test_float64_weights_are_never_narrowed() -> None:
    """float64 tensors keep float64 accumulators even when float32 is asked for."""
    shadow = ShadowWeights(SwaRule())
    for step, value in enumerate((1e300, 3e300)):
        shadow.fold({"w": torch.tensor([value], dtype=torch.float64)}, step=step)
    assert shadow.value()["w"].item() == 2e300


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.spelling)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_restored_shadow_folds_on_bit_for_bit(rule: Rule, dtype: torch.dtype, stop: int) -> None:
    """Fold, write, read, restore and fold on gives the very bits of folding without a break."""
    first = folded(rule, STEPS[: stop + 2], dtype=dtype)
    tensors, metadata = first.state()
    kept = read_checkpoint([serialize(tensors, metadata=metadata)])

    again = ShadowWeights.restore(parse_rule(rule.spelling), kept.tensors, kept.metadata)
    assert (again.n_averaged, again.last_step, again.dtype) == (first.n_averaged, first.last_step, dtype)
    for step in STEPS[stop + 2 :]:
        again.fold(state_at(step), step=step)

    whole = folded(rule, STEPS, dtype=dtype)
    assert_same_bits(again.value(), whole.value())
    assert again.coefficients() == whole.coefficients()


def test_a_restored_shadow_shares_no_memory() -> None:
    """Folding the restored shadow leaves the tensors it was restored from alone."""
    tensors, metadata = folded(SwaRule(), STEPS[:2], dtype=torch.float32).state()
    before = serialize(tensors)
    ShadowWeights.restore(SwaRule(), tensors, metadata).fold(state_at(999), step=999)
    assert serialize(tensors) == before


def test_a_step_that_does_not_count_is_ignored() -> None:
    """A checkpoint before start_step is not folded, and fold says so."""
    shadow = ShadowWeights(SwaRule(start_step=100))
    assert shadow.fold(state_at(99), step=99) is False
    assert (shadow.n_averaged, shadow.last_step, shadow.coefficients()) == (0, None, {})
    assert shadow.fold(state_at(100), step=100) is True
    assert (shadow.n_averaged, shadow.last_step, shadow.coefficients()) == (1, 100, {100: 1.0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_unchecked_gives_the_same_bits(dtype: torch.dtype) -> None:
    """Without the look for NaN and infinity, sound checkpoints make the same average."""
    checked, unchecked = ShadowWeights(SwaRule()), ShadowWeights(SwaRule())
    for step in STEPS:
        checked.fold(state_at(step, dtype=dtype), step=step)
        unchecked.fold(state_at(step, dtype=dtype), step=step, check_finite=False)

    assert_same_bits(unchecked.value(), checked.value())


class Tied(nn.Module):
    """A language model's usual tie: the output layer is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_tensors_are_folded_once_and_stay_tied() -> None:
    """A tied tensor counts once per checkpoint, has both names in the value, and survives a restart."""
    shadow, seen = ShadowWeights(SwaRule(), dtype=torch.float64), []
    for step in range(10):
        model = Tied()
        seen.append(model.embedding.weight.detach())
        shadow.fold(model.state_dict(), step=step)
        shadow = ShadowWeights.restore(SwaRule(), *shadow.state())

    value = shadow.value()

    assert value["head.weight"] is value["embedding.weight"]
    assert torch.allclose(value["head.weight"], torch.stack(seen).mean(0))
    assert list(shadow.state()[0]) == ["embedding.weight"]
    Tied().load_state_dict(value, strict=True)


def test_ties_that_come_apart_are_refused() -> None:
    """Copies of a tied tensor are accepted while they agree, and refused with ties_changed when they do not."""
    shadow = ShadowWeights(SwaRule())
    shadow.fold(Tied().state_dict(), step=1)
    copies = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    shadow.fold({**copies, "head.weight": copies["embedding.weight"].clone()}, step=2)

    with pytest.raises(IncompatibleError, match="were one tensor") as caught:
        shadow.fold({**copies, "head.weight": copies["head.weight"] + 1}, step=3)

    assert caught.value.code == "ties_changed"
    assert shadow.n_averaged == 2


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    prefixes=st.lists(st.sampled_from(["", "module.", "_orig_mod.", "module._orig_mod."]), min_size=4, max_size=4),
)
def test_order_and_wrappers_do_not_matter(seed: int, prefixes: list[str]) -> None:
    """Tensors in any order, under DDP's and compile's prefixes, noncontiguous or not, give the same bits."""
    shuffle = random.Random(seed)
    plain, mixed = ShadowWeights(EmaRule(half_life_steps=9)), ShadowWeights(EmaRule(half_life_steps=9))
    for step, prefix in enumerate(prefixes):
        state = state_at(step)
        plain.fold(state, step=step)
        state["big"] = state["big"].t().contiguous().t()
        names = shuffle.sample(list(state), k=len(state))
        mixed.fold({prefix + name: state[name] for name in names}, step=step)
    assert_same_bits(mixed.value(), plain.value())


def test_folding_does_not_touch_or_keep_the_checkpoint() -> None:
    """The caller may go on training in place: parameters are read, not kept."""
    model = nn.Linear(3, 3)
    shadow = ShadowWeights(SwaRule())
    shadow.fold(dict(model.named_parameters()), step=1)
    expected = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(shadow.value()["weight"], expected)
