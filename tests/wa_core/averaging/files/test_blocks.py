"""Blocks of bytes against torch's conversions and rational arithmetic."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.checkpoints import nearest
from wa_core.averaging.files.blocks import BLOCK, Rounding, WeightedSum, is_finite, narrow, widen

if TYPE_CHECKING:
    from numpy.typing import NDArray

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
SMALL = [name for name in DTYPES if name not in ("F64", "F32")]


def raw_of(values: Any, dtype: str) -> NDArray[np.uint8]:
    """`values` as torch writes them in `dtype`."""
    return torch.as_tensor(values).to(DTYPES[dtype]).reshape(-1).view(torch.uint8).numpy().copy()


def every_code(dtype: str) -> NDArray[np.uint8]:
    """The bytes of every number that `dtype` has."""
    if DTYPES[dtype].itemsize == 1:
        return np.arange(256, dtype=np.uint8)
    return np.arange(1 << 16, dtype=np.uint16).view(np.uint8)


@pytest.mark.parametrize("dtype", SMALL)
def test_every_number_of_a_small_dtype_is_widened_as_torch_does(dtype: str) -> None:
    """All 256 or 65,536 codes of a dtype mean what they mean to torch, NaN, infinity and signs included."""
    raw = every_code(dtype)

    found = widen(raw, dtype).astype(np.float32)

    expected = torch.from_numpy(raw.copy()).view(DTYPES[dtype]).float().numpy()
    assert np.array_equal(found, expected, equal_nan=True)
    numbers = ~np.isnan(expected)
    assert np.array_equal(np.signbit(found[numbers]), np.signbit(expected[numbers]))


@pytest.mark.parametrize("dtype", SMALL)
def test_every_number_of_a_small_dtype_survives_the_way_there_and_back(dtype: str) -> None:
    """What is widened and narrowed again has the bytes it had."""
    raw = every_code(dtype)
    item = DTYPES[dtype].itemsize
    raw = raw[np.repeat(np.isfinite(widen(raw, dtype)), item)]

    assert np.array_equal(narrow(widen(raw, dtype).astype(np.float64), dtype), raw)


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("beside", [1 + 2.0**-50, 1 - 2.0**-50])
def test_narrowing_from_float64_rounds_only_once(dtype: str, beside: float) -> None:
    """A hair beside the middle of two numbers the nearer one is chosen, not the one by way of float32."""
    numbers = widen(every_code(dtype), dtype)
    numbers = np.unique(numbers[np.isfinite(numbers)].astype(np.float64))
    middles = (numbers[1:] + numbers[:-1]) / 2
    is_low = (np.abs(middles * beside) < np.abs(middles)) == (middles > 0)

    found = widen(narrow(middles * beside, dtype), dtype)

    expected = np.where(is_low, numbers[:-1], numbers[1:])
    assert np.array_equal(found[middles != 0], expected[middles != 0])


@given(
    values=st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=20),
    dtype=st.sampled_from(["F64", "F32", "F16", "BF16"]),
)
@settings(max_examples=50, deadline=None)
def test_narrowing_gives_the_nearest_number_and_of_two_the_even_one(values: list[float], dtype: str) -> None:
    """Every dtype rounds to nearest, ties to even, as rational arithmetic says."""
    found = torch.from_numpy(narrow(np.array(values), dtype).copy()).view(DTYPES[dtype])
    assert found.tolist() == [nearest(Fraction(value), DTYPES[dtype]).item() for value in values]


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3"])
def test_rounding_in_the_same_memory_leaves_no_trace(dtype: str) -> None:
    """Tile after tile of other lengths, beyond one block, with NaN in one of them: as if each were the first."""
    draw, rounding = np.random.default_rng(0), Rounding(max_elements=BLOCK + 500)
    for size, bad in ((BLOCK + 500, BLOCK + 3), (7, None), (BLOCK + 500, None), (0, None), (BLOCK, 0)):
        values = draw.standard_normal(size)
        if bad is not None:
            values[bad] = np.nan
        found = rounding.narrow(values, dtype).tobytes()
        assert found == b"".join(narrow(values[at : at + 999], dtype).tobytes() for at in range(0, size, 999))


def test_float8_saturates_and_the_others_become_infinite() -> None:
    """What does not fit is the largest number of float8, and infinity in the wider formats."""
    assert widen(narrow(np.array([1e9, -1e9]), "F8_E4M3"), "F8_E4M3").tolist() == [448.0, -448.0]
    assert widen(narrow(np.array([1e9, -1e9]), "F16"), "F16").tolist() == [np.inf, -np.inf]
    assert widen(narrow(np.array([1e39]), "BF16"), "BF16").tolist() == [np.inf]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan(dtype: str) -> None:
    """No dtype turns NaN into a number."""
    assert np.isnan(widen(narrow(np.array([np.nan, 1.0]), dtype), dtype)).tolist() == [True, False]
    assert not is_finite(narrow(np.array([1.0, np.nan]), dtype), dtype)
    assert is_finite(narrow(np.array([1.0, 2.0]), dtype), dtype)


def test_integers_are_always_finite() -> None:
    """Bytes of a dtype without NaN are not looked at."""
    assert is_finite(np.full(8, 255, np.uint8), "I64")


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3"])
@pytest.mark.parametrize("accumulator", ["float64", "float32"])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_constant_stays_exactly_constant(dtype: str, accumulator: Any, data: st.DataObject) -> None:
    """Whatever the coefficients, the average of equal checkpoints is that checkpoint, bit for bit."""
    drawn = data.draw(st.lists(st.floats(0.01, 1), min_size=1, max_size=9))
    coefficients = [value / sum(drawn) for value in drawn]
    values = data.draw(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=9))
    raw = raw_of(values, dtype)
    summed = WeightedSum(coefficients, max_elements=16, accumulator=accumulator)

    summed.begin(len(values), dtype)
    for _ in coefficients:
        summed.add(raw)

    assert widen(narrow(summed.values(), dtype), dtype).tolist() == widen(raw, dtype).tolist()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("coefficients", [[0.25] * 4, [0.1, 0.2, 0.3, 0.4]])
@pytest.mark.parametrize("accumulator", ["float64", "float32"])
def test_bits_do_not_depend_on_the_cut(dtype: str, coefficients: list[float], accumulator: Any) -> None:
    """A tile summed whole and summed in two pieces has the same bits, beyond one block too."""
    size = BLOCK + 1000
    draw = np.random.default_rng(0)
    sources = [raw_of(draw.standard_normal(size), dtype) for _ in coefficients]
    item = DTYPES[dtype].itemsize

    def summed(begin: int, end: int) -> bytes:
        one = WeightedSum(coefficients, max_elements=size, accumulator=accumulator)
        one.begin(end - begin, dtype)
        for raw in sources:
            one.add(raw[begin * item : end * item])
        return narrow(one.values(), dtype).tobytes()

    assert summed(0, size) == summed(0, 777) + summed(777, size)


def test_nan_and_infinity_in_any_source_are_noticed() -> None:
    """One bad value in one source shows in the sum, also where two infinities cancel."""
    for bad in ([np.nan, 1.0], [np.inf, -np.inf], [1.0, -np.inf]):
        for accumulator in ("float64", "float32"):
            summed = WeightedSum([0.5, 0.5], max_elements=4, accumulator=accumulator)
            summed.begin(3, "F32")
            for value in bad:
                summed.add(raw_of([1.0, value, 2.0], "F32"))
            assert not summed.has_only_finite(summed.values())


def test_a_mean_of_twenty_thousand_is_right_to_the_last_place() -> None:
    """20,000 checkpoints in the float64 accumulator: within one unit in float32's last place of the exact mean."""
    num, size = 20_000, 50
    draw = np.random.default_rng(1)
    rows = (draw.standard_normal((num, size)) * 10.0 ** draw.integers(-4, 4, size)).astype(np.float32)
    summed = WeightedSum([1 / num] * num, max_elements=size)
    summed.begin(size, "F32")
    for row in rows:
        summed.add(row.view(np.uint8))

    found = narrow(summed.values(), "F32").view(np.float32)

    for column in range(size):
        exact = sum((Fraction(float(value)) for value in rows[:, column]), Fraction(0)) / num
        assert abs(Fraction(float(found[column])) - exact) <= Fraction(float(np.spacing(abs(found[column]))))
