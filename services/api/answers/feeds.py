"""Pages of what grows while a run trains: log text and metric lines, both written in numbered parts.

A cursor names an attempt, a part and a line in it, so a page is cut anywhere and nothing is read twice.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from services.api.problems import HttpProblem
from services.api.schemas import Feed, LogLine
from wa_core import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from wa_core.store.base import ObjectStore

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Position:
    """Just after line `line` (from 1) of part `part` of an attempt."""

    attempt: int = 0
    part: int = 0
    line: int = 0

    def __str__(self) -> str:
        return f"{self.attempt}-{self.part}-{self.line}"

    @classmethod
    def parse(cls, text: str | None) -> Position:
        """Read a cursor; None is the beginning.

        Raises:
            HttpProblem: 422, it is none of ours.
        """
        if text is None:
            return cls()
        if not re.fullmatch(r"\d{1,4}-\d{1,8}-\d{1,9}", text, re.ASCII):
            message = f"{text[:100]!r} is no cursor; use the `next` of a page"
            raise HttpProblem(message, status=422, code="invalid_request", faults=[("query.after", message)])
        return cls(*(int(number) for number in text.split("-")))


@dataclass(frozen=True, slots=True)
class LineFeed(Generic[T]):
    """One feed of a run: the folder of an attempt's parts, the key of a part in it, and how a line is shown."""

    prefix: Callable[[int], str]
    key: Callable[[int, int], str]
    show: Callable[[Position, str], T]

    def read(
        self, store: ObjectStore, attempts: Iterable[int], *, after: Position, limit: int
    ) -> tuple[list[tuple[Position, T]], bool]:
        """Up to `limit` lines of `attempts` with where each ends, and whether there are more."""
        found = list(islice(_lines(store, self, attempts, after=after), limit + 1))
        return [(position, self.show(position, text)) for position, text in found[:limit]], len(found) > limit

    def page(self, store: ObjectStore, attempts: Iterable[int], *, after: Position, limit: int) -> Feed[T]:
        """The same as a page."""
        lines, has_more = self.read(store, attempts, after=after, limit=limit)
        last = lines[-1][0] if lines else after
        return Feed(
            data=[line for _, line in lines], has_more=has_more, next=str(last) if last != Position() else None
        )


def log_feed(run_id: str, *, rank: str) -> LineFeed[LogLine]:
    """The lines that `rank` wrote."""
    return LineFeed(
        prefix=lambda attempt: layout.logs_prefix(run_id, attempt=attempt, rank=rank),
        key=lambda attempt, part: layout.logs_part(run_id, attempt=attempt, rank=rank, part=part),
        show=lambda position, text: LogLine(attempt=position.attempt, rank=rank, text=text),
    )


def metric_feed(run_id: str) -> LineFeed[dict[str, Any]]:
    """The metric lines."""
    return LineFeed(
        prefix=lambda attempt: layout.metrics_prefix(run_id, attempt=attempt),
        key=lambda attempt, part: layout.metrics_part(run_id, attempt=attempt, part=part),
        show=lambda position, text: _metric(text) | {"attempt": position.attempt},
    )


def _lines(
    store: ObjectStore, parts: LineFeed[Any], attempts: Iterable[int], *, after: Position
) -> Iterator[tuple[Position, str]]:
    for attempt in attempts:
        if attempt < after.attempt:
            continue
        first = after.part if attempt == after.attempt else 0
        # The part that the cursor stands in is read again: it may hold more lines than the page had room for.
        start_after = parts.key(attempt, first - 1) if first else ""
        for info in store.list(parts.prefix(attempt), start_after=start_after):
            part = layout.number_of(info.key) or 0
            num_read = after.line if (attempt, part) == (after.attempt, after.part) else 0
            # Only newlines end lines: `splitlines` would also cut at form feeds and Unicode separators.
            text = store.get(info.key).decode(errors="replace").removesuffix("\n").split("\n")
            for number, line in enumerate(text[num_read:], num_read + 1):
                yield Position(attempt, part, number), line


def _metric(text: str) -> dict[str, Any]:
    """A metric line; a number that JSON cannot carry becomes null."""
    try:
        value = json.loads(text, parse_constant=lambda _: None)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"unreadable": text}
