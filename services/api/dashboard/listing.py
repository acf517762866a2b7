"""The rows of the run list: which runs match, and what averaging did for each of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from services.api.answers.resources import average_resources, run_resource
from services.api.dashboard.verdicts import Verdict, best_verdict
from services.api.state.index import Query
from wa_core.records import RunState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.api.schemas import RunResource
    from services.api.state.catalog import Catalog
    from services.api.state.index import Row as IndexRow
    from services.api.state.snapshots import RunSnapshot

PAGE_SIZE = 25
MAX_TEXT = 200
_BATCH = 200


@dataclass(frozen=True, slots=True)
class Filters:
    """Which runs are wanted: in this state, with this ``key:value`` label or key, with this text in it."""

    state: str = ""
    label: str = ""
    text: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether all runs are wanted."""
        return not (self.state or self.label or self.text)

    def admit(self, run: IndexRow) -> bool:
        """Whether a run is wanted."""
        if self.label and self.label not in run.labels and self.label not in _spelled(run):
            return False
        words = self.text.lower().split()
        return self.state in {"", run.state.value} and (not words or _holds(run, words))


@dataclass(frozen=True, slots=True)
class Row:
    """One run of the list."""

    run: RunResource
    verdict: Verdict | None
    num_averages: int

    @classmethod
    def of(cls, run: RunSnapshot) -> Row:
        """The row of a run."""
        averages = average_resources(run)
        return cls(run_resource(run), best_verdict(averages), len(averages))


def rows(catalog: Catalog, filters: Filters, *, after: str | None) -> tuple[list[Row], str | None]:
    """A page of runs, newest first, and where the next page begins."""
    found = list(islice(_matching(catalog, filters, after=after), PAGE_SIZE + 1))
    following = found[PAGE_SIZE - 1] if len(found) > PAGE_SIZE else None
    return [Row.of(run) for run in _read(catalog, found[:PAGE_SIZE])], following


def _read(catalog: Catalog, run_ids: list[str]) -> list[RunSnapshot]:
    """The runs, read from the bucket where what is in memory may be old."""
    recent = {run_id: run for run_id in run_ids if (run := catalog.recent(run_id))}
    read = catalog.snapshots(run_id for run_id in run_ids if run_id not in recent)
    found = recent | {run.spec.run_id: run for run in read}
    return [found[run_id] for run_id in run_ids if run_id in found]


def _matching(catalog: Catalog, filters: Filters, *, after: str | None) -> Iterator[str]:
    states = [state for state in RunState if state == filters.state]
    query = Query(states=states)
    while True:
        found = catalog.index.recent_page(query, before=after, limit=_BATCH)
        if found is None:
            found = catalog.index.page(query, before=after, limit=_BATCH)
        yield from (row.run_id for row in found if filters.admit(row))
        if len(found) < _BATCH:
            return
        after = found[-1].run_id


def _spelled(run: IndexRow) -> list[str]:
    return [f"{key}:{value}" for key, value in run.labels.items()]


def _holds(run: IndexRow, words: list[str]) -> bool:
    text = " ".join((run.run_id, run.recipe or "", run.owner, *_spelled(run))).lower()
    return all(word in text for word in words)
