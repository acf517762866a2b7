"""What averaging did, in one line: averaged minus raw on held-out data, its interval, and who has won. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from services.api.dashboard.numbers import decimals_for

if TYPE_CHECKING:
    from collections.abc import Iterable

    from services.api.schemas import AverageResource
    from wa_core.records import Comparison

WORDS = {"averaged": "averaged wins", "raw": "raw wins", "tie": "tie"}


@dataclass(frozen=True, slots=True)
class Strip:
    """Where an interval lies on a line from 0 to 100 that holds zero, as numbers for a drawing."""

    low: float
    high: float
    difference: float
    zero: float

    @classmethod
    def of(cls, found: Comparison) -> Strip:
        """The interval and zero, with an eighth of the line free on either side."""
        start, end = min(found.low, 0.0), max(found.high, 0.0)
        length = (end - start) or 1.0

        def place(value: float) -> float:
            return round(12.5 + 75 * (value - start) / length, 2)

        return cls(place(found.low), place(found.high), place(found.difference), place(0.0))


@dataclass(frozen=True, slots=True)
class Verdict:
    """The comparison of one average with the raw weights, as it is shown."""

    average: str
    found: Comparison
    raw: float | None

    @property
    def won(self) -> Literal["averaged", "raw", "tie"]:
        """Who has the better side of the interval."""
        return self.found.won

    @property
    def words(self) -> str:
        """Who has won, in words."""
        return WORDS[self.won]

    @property
    def decimals(self) -> int:
        """How many decimals the difference and its interval are shown with."""
        return decimals_for(self.found.low, self.found.high)

    @property
    def relative(self) -> float | None:
        """The difference as a part of the raw metric."""
        return self.found.difference / self.raw if self.raw else None

    @property
    def strip(self) -> Strip:
        """The interval, to be drawn."""
        return Strip.of(self.found)


def verdict_of(average: AverageResource) -> Verdict | None:
    """An average's verdict, None before it was compared."""
    found, raw = average.evaluation.comparison, average.evaluation.raw
    if found is None:
        return None
    return Verdict(average=average.name, found=found, raw=raw.get(found.metric) if raw else None)


def best_verdict(averages: Iterable[AverageResource]) -> Verdict | None:
    """The verdict on the average that gained most over the raw weights, None before any was compared."""
    verdicts = [verdict for average in averages if (verdict := verdict_of(average))]
    return min(verdicts, key=lambda verdict: verdict.found.difference, default=None)
