"""Blocks of raw tensor bytes: widened, summed with coefficients, rounded once. NumPy only.

It knows little-endian element formats and arithmetic; not files, names or rules. The invariant: every function is
elementwise and sums in the order given, so the bits of a result do not depend on how a tensor is cut into blocks.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from wa_core.averaging.buffers import Raw, new_buffer

if TYPE_CHECKING:
    from collections.abc import Sequence

AccumulatorDtype = Literal["float64", "float32"]
Floats = NDArray[np.floating[Any]]
Bits = NDArray[np.uint32]

#: Elements worked on at a time: small enough that what is summed stays in the processor's cache.
BLOCK = 1 << 17
_NATIVE = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
# Bits of the exponent, its bias, and how many of the largest codes are not finite.
_FLOAT8 = {"F8_E4M3": (4, 7, 1), "F8_E5M2": (5, 15, 4), "F8_E4M3FNUZ": (4, 8, 0), "F8_E5M2FNUZ": (5, 16, 0)}
_WIDEST_NARROWED = 8
_UNEVEN = 1e-12


def widen(raw: Raw, dtype: str, *, out: Bits | None = None) -> Floats:
    """The numbers in `raw`, exactly, as float64, float32 or float16; a view of `raw` where the format allows it.

    Args:
        raw: bytes of whole elements, flat.
        dtype: a float dtype by the format's name.
        out: memory for bfloat16's numbers, one for each element, instead of new memory.
    """
    if dtype in _NATIVE:
        native: Floats = raw.view(_NATIVE[dtype])
        return native
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        codes = raw.view("<u2")
        upper = np.empty(len(codes), np.uint32) if out is None else out
        np.copyto(upper, codes)
        np.left_shift(upper, 16, out=upper)
        return upper.view(np.float32)
    values: Floats = _float8_values(dtype)[raw]
    return values


def narrow(values: Floats, dtype: str) -> Raw:
    """`values` rounded once, to nearest and ties to even, as bytes of `dtype`; may be a view of `values`.

    Args:
        values: flat float64 or float32.
        dtype: a float dtype by the format's name. Beyond its range float8 saturates, the others become infinite.
    """
    return Rounding(max_elements=len(values)).narrow(values, dtype)


def is_finite(raw: Raw, dtype: str) -> bool:
    """Whether `raw` has neither NaN nor infinity; always so for integers and bools."""
    if dtype not in _NATIVE and dtype != "BF16" and dtype not in _FLOAT8:
        return True
    return bool(np.isfinite(widen(raw, dtype)).all())


class Rounding:
    """`narrow` for tile after tile, in the same memory: new memory costs more than the arithmetic.

    Args:
        max_elements: the largest tile.
    """

    def __init__(self, *, max_elements: int) -> None:
        block = min(BLOCK, max_elements)
        self._result = new_buffer(max_elements * _WIDEST_NARROWED)
        self._bits, self._spare = np.empty((2, block), np.uint32)
        self._is_middle = np.empty(block, np.bool_)

    def narrow(self, values: Floats, dtype: str) -> Raw:
        """As the function `narrow`; the bytes are valid until the next call."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if dtype in _NATIVE:
                kind = np.dtype(_NATIVE[dtype])
                if values.dtype == kind:
                    return values.view(np.uint8)
                native = self._result[: len(values) * kind.itemsize]
                np.copyto(native.view(kind), values, casting="same_kind")
                return native
            if dtype == "BF16":
                codes = self._result[: 2 * len(values)].view(np.uint16)
                for begin in range(0, len(values), BLOCK):
                    self._to_bfloat16(values[begin : begin + BLOCK], codes[begin : begin + BLOCK])
                return codes.view(np.uint8)
            return _to_float8(values, dtype)

    def _to_bfloat16(self, values: Floats, codes: NDArray[np.uint16]) -> None:
        bits, spare, is_middle = (memory[: len(values)] for memory in (self._bits, self._spare, self._is_middle))
        single = bits.view(np.float32)
        np.copyto(single, values, casting="same_kind")
        if values.dtype == np.float64:
            # Rounding to float32 first may land on the middle between two bfloat16 numbers; then it decides
            # which way. The middle has a one and then zeros in its lower half.
            np.equal(np.left_shift(bits, 16, out=spare), 1 << 31, out=is_middle)
            middle = np.flatnonzero(is_middle)
            excess = np.abs(values[middle]) - np.abs(single[middle].astype(np.float64))
            bits[middle] += np.sign(excess).astype(np.int32).view(np.uint32)
        is_nan = None if math.isfinite(float(np.add.reduce(single))) else np.isnan(single)
        np.bitwise_and(np.right_shift(bits, 16, out=spare), 1, out=spare)
        np.add(bits, np.add(spare, 0x7FFF, out=spare), out=bits)
        np.copyto(codes, np.right_shift(bits, 16, out=bits), casting="same_kind")
        if is_nan is not None:
            codes[is_nan] = 0x7FC0


class WeightedSum:
    """``Σ c_i x_i`` over one tile, source after source; reused for tile after tile.

    In float64 it sums `c_i x_i`, or plain `x_i` when all coefficients are equal. Where the accumulator has no
    digits to spare (float64 tensors, float32 accumulators) it sums ``c_i (x_i - x_0)`` onto ``x_0``, so that what
    is constant stays exactly constant.

    Args:
        coefficients: one for each source, in order; they sum to 1.
        max_elements: the largest tile.
        accumulator: what is summed in; float64 tensors always in float64.
    """

    def __init__(
        self, coefficients: Sequence[float], *, max_elements: int, accumulator: AccumulatorDtype = "float64"
    ) -> None:
        self._coefficients = coefficients
        num = len(coefficients)
        self._is_mean = all(abs(coefficient * num - 1) < _UNEVEN for coefficient in coefficients)
        self._accumulator = accumulator
        self._memory = np.empty((2, max_elements), np.float64)
        self._product = np.empty(min(BLOCK, max_elements), np.float64)
        self._widened = np.empty(min(BLOCK, max_elements), np.uint32)
        self.begin(0, "F64")

    def begin(self, num_elements: int, dtype: str) -> None:
        """Start a tile of `num_elements` elements of `dtype`."""
        kind = np.dtype(np.float64 if dtype == "F64" else self._accumulator)
        self._dtype, self._num_added = dtype, 0
        self._is_anchored = dtype == "F64" or self._accumulator == "float32"
        self._sum: Floats = self._memory[0].view(kind)[:num_elements]
        self._anchor = self._memory[1].view(kind)[:num_elements]
        self._scratch = self._product.view(kind)[: self._product.size]

    def add(self, raw: Raw) -> None:
        """Add the next source's tile."""
        item = len(raw) // max(len(self._sum), 1)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            for begin in range(0, len(self._sum), BLOCK):
                end = min(begin + BLOCK, len(self._sum))
                piece = raw[begin * item : end * item]
                self._add_block(slice(begin, end), widen(piece, self._dtype, out=self._widened[: end - begin]))
        self._num_added += 1

    def values(self) -> Floats:
        """The sum; valid until the next `begin`."""
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if self._is_anchored:
                np.add(self._sum, self._anchor, out=self._sum)
            elif self._is_mean:
                self._divide(len(self._coefficients))
        return self._sum

    def has_only_finite(self, values: Floats) -> bool:
        """Whether no source had NaN or infinity, told from what `values` returned.

        Neither disappears in a sum. A float64 sum of narrower numbers cannot overflow; otherwise `False` may also
        mean that.
        """
        if self._is_anchored:
            return bool(np.isfinite(values).all())
        with np.errstate(over="ignore", invalid="ignore"):
            return math.isfinite(float(np.add.reduce(values)))

    def _divide(self, num: int) -> None:
        if num & (num - 1):
            np.divide(self._sum, num, out=self._sum)
        else:  # as exact, and several times as fast
            np.multiply(self._sum, 1 / num, out=self._sum)

    def _add_block(self, block: slice, values: Floats) -> None:
        into, scratch = self._sum[block], self._scratch[: len(values)]
        coefficient = self._coefficients[self._num_added]
        if self._is_anchored and self._num_added == 0:
            self._anchor[block] = values
            into.fill(0)
        elif self._is_anchored:
            np.subtract(values, self._anchor[block], out=scratch)
            np.multiply(scratch, coefficient, out=scratch)
            np.add(into, scratch, out=into)
        elif self._num_added == 0 and self._is_mean:
            np.copyto(into, values)
        elif self._num_added == 0:
            np.multiply(values, coefficient, out=into, dtype=np.float64)
        elif self._is_mean:
            np.add(into, values, out=into)
        else:
            np.multiply(values, coefficient, out=scratch, dtype=np.float64)
            np.add(into, scratch, out=into)


def _to_float8(values: Floats, dtype: str) -> Raw:
    table = _float8_values(dtype)[:128]
    finite = table[np.isfinite(table)].astype(np.float64)
    middles = (finite[:-1] + finite[1:]) / 2
    size = np.abs(values).astype(np.float64)
    codes = np.searchsorted(middles, size, side="left")
    is_tie = size == middles[np.minimum(codes, len(middles) - 1)]
    codes += is_tie & (codes % 2 == 1)
    is_negative = np.signbit(values)
    if dtype.endswith("UZ"):  # no negative zero: its code is NaN
        is_negative &= codes > 0
    found = (codes | (is_negative.astype(codes.dtype) << 7)).astype(np.uint8)
    found[np.isnan(values)] = 0x80 if dtype.endswith("UZ") else 0x7F
    return found


@cache
def _float8_values(dtype: str) -> NDArray[np.float32]:
    exponent_bits, bias, num_special = _FLOAT8[dtype]
    mantissa_bits = 7 - exponent_bits
    codes = np.arange(128)
    exponent, mantissa = codes >> mantissa_bits, (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    is_normal = exponent > 0
    positive = np.ldexp(mantissa + is_normal, np.maximum(exponent, 1) - bias).astype(np.float32)
    positive[128 - num_special :] = np.nan
    if dtype == "F8_E5M2":
        positive[0x7C] = np.inf
    table = np.concatenate([positive, -positive])
    if dtype.endswith("UZ"):
        table[128] = np.nan
    return table
