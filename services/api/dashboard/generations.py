"""The part of an average's history that a page shows: its newest generations that were measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.api.answers.history import MAX_PAGE
from wa_core.records import HEADLINE_METRIC

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.api.answers.history import History
    from services.api.schemas import GenerationResource
    from services.api.state.catalog import Catalog


def newest_generations(catalog: Catalog, history: History, run_id: str, name: str) -> list[GenerationResource]:
    """As many of the newest assessed generations as a chart can show, oldest first."""
    numbers = catalog.assessed_numbers(run_id, name)
    after = numbers[-MAX_PAGE - 1] if len(numbers) > MAX_PAGE else 0
    return history.page(run_id, name, after=after, limit=MAX_PAGE, is_whole=False).data


def metric_names(generations: Sequence[GenerationResource]) -> list[str]:
    """The held-out metrics that any of them has, the headline first."""
    measured = (
        side
        for found in generations
        for side in (found.evaluation.raw, found.evaluation.averaged)
        if side is not None
    )
    names = {name for side in measured for name in side} - {"step"}
    return sorted(names, key=lambda name: (name != HEADLINE_METRIC, name))
