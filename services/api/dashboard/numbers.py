"""Numbers as people read them: significant digits, SI sizes, durations, a real minus sign. Pure."""

from __future__ import annotations

import math
from datetime import UTC, datetime

MINUS = "\N{MINUS SIGN}"
NARROW = "\N{NARROW NO-BREAK SPACE}"
NOTHING = "\N{EN DASH}"

_TIMES = f"{NARROW}\N{MULTIPLICATION SIGN}{NARROW}10"
_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
_SIZES = ("B", "kB", "MB", "GB", "TB", "PB")
_PLAIN = (1e-4, 1e6)
_SHORT_S = 60
_LONG_S = 3600
_DAY_S = 86_400


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits; very large and small ones as powers of ten."""
    if value is None:
        return NOTHING
    if value == 0 or not math.isfinite(value):
        return f"{value:g}".replace("-", MINUS)
    if _PLAIN[0] <= abs(value) < _PLAIN[1]:
        text = f"{value:.{max(0, digits - 1 - _exponent(value, digits))}f}"
    else:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        text = f"{mantissa}{_TIMES}{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return text.replace("-", MINUS)


def signed(value: float | None, decimals: int) -> str:
    """A difference with its sign and so many decimals."""
    return NOTHING if value is None else f"{value:+.{decimals}f}".replace("-", MINUS)


def decimals_for(low: float, high: float) -> int:
    """How many decimals an interval deserves: two significant digits of half its width."""
    half = (high - low) / 2
    return 4 if half <= 0 else min(8, max(0, 1 - _exponent(half, 2)))


def metric(value: float | None, name: str) -> str:
    """A held-out metric: an accuracy in per cent, all others with three digits."""
    return percent(value) if value is not None and "accuracy" in name else number(value)


def percent(value: float | None, decimals: int = 2) -> str:
    """A part of one, in per cent."""
    return NOTHING if value is None else f"{value * 100:.{decimals}f}{NARROW}%".replace("-", MINUS)


def count(value: int | None) -> str:
    """A whole number, in groups of three."""
    return NOTHING if value is None else f"{value:,}".replace(",", NARROW)


def size(size_bytes: int | None) -> str:
    """A size in bytes, in powers of 1000."""
    if size_bytes is None:
        return NOTHING
    power = min(len(_SIZES) - 1, int(math.log10(max(size_bytes, 1))) // 3)
    return f"{size_bytes / 1000**power:.{1 if power else 0}f}{NARROW}{_SIZES[power]}"


def duration(seconds: float | None) -> str:
    """A length of time in its two largest units."""
    if seconds is None:
        return NOTHING
    if seconds < _SHORT_S:
        return f"{seconds:.{1 if seconds < 10 else 0}f}{NARROW}s"  # noqa: PLR2004  one decimal while it is one digit
    whole = round(seconds)
    if whole < _LONG_S:
        return f"{whole // 60}{NARROW}min {whole % 60}{NARROW}s"
    if whole < _DAY_S:
        return f"{whole // 3600}{NARROW}h {whole % 3600 // 60}{NARROW}min"
    return f"{whole // _DAY_S}{NARROW}d {whole % _DAY_S // 3600}{NARROW}h"


def clock_time(at: datetime | None) -> str:
    """A moment in UTC, to the second."""
    return NOTHING if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _exponent(value: float, digits: int) -> int:
    """The power of ten of a number that has been rounded to `digits`."""
    return int(f"{value:.{digits - 1}e}".partition("e")[2])
