"""The rows of the run list: which runs match, and what averaging did for each of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from services.api.dashboard.verdicts import Verdict, best_verdict
from services.api.resources import average_resources, run_resource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.api.catalog import Catalog
    from services.api.schemas import RunResource

PAGE_SIZE = 25
MAX_TEXT = 200
_BATCH = 50


@dataclass(frozen=True, slots=True)
class Filters:
    """Which runs are wanted: in this state, with this ``key:value`` label, with this text in it. Empty is all."""

    state: str = ""
    label: str = ""
    text: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether all runs are wanted."""
        return not (self.state or self.label or self.text)

    def admit(self, run: RunResource) -> bool:
        """Whether a run is wanted."""
        labels = [f"{key}:{value}" for key, value in run.labels.items()]
        words = " ".join((run.run_id, run.recipe or "", run.owner, *labels)).lower()
        return (
            self.state in {"", run.state.value}
            and (not self.label or self.label in labels or self.label in run.labels)
            and all(word in words for word in self.text.lower().split())
        )


@dataclass(frozen=True, slots=True)
class Row:
    """One run of the list."""

    run: RunResource
    verdict: Verdict | None
    num_averages: int


def rows(catalog: Catalog, filters: Filters, *, after: str | None) -> tuple[list[Row], str | None]:
    """A page of runs, newest first, and where the next page begins."""
    found = list(islice(_matching(catalog, filters, after=after), PAGE_SIZE + 1))
    return found[:PAGE_SIZE], found[PAGE_SIZE - 1].run.run_id if len(found) > PAGE_SIZE else None


def _matching(catalog: Catalog, filters: Filters, *, after: str | None) -> Iterator[Row]:
    run_ids = catalog.run_ids(before=after)
    for start in range(0, len(run_ids), _BATCH):
        for snapshot in catalog.snapshots(run_ids[start : start + _BATCH]):
            run = run_resource(snapshot)
            if filters.admit(run):
                averages = average_resources(snapshot)
                yield Row(run=run, verdict=best_verdict(averages), num_averages=len(averages))
