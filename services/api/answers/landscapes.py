"""Turns what the bucket says of a landscape into the API's resource; refuses what no averager could work out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.api.schemas import LandscapeResource, Reason
from wa_core.errors import ConflictError, NoAverageYetError
from wa_core.records import NO_RECIPE

if TYPE_CHECKING:
    from services.api.state.catalog import Catalog
    from wa_core.catalog.jobs import Job
    from wa_core.records import LandscapeRecord, LandscapeResult


def check_possible(catalog: Catalog, run_id: str, name: str) -> None:
    """Refuse a landscape of an average without weights, or of a run without anything to measure with.

    Raises:
        AverageNotFoundError: the run has no average of this name.
        NoAverageYetError: nothing has been published yet.
        ConflictError: the run has no recipe (`no_recipe`).
    """
    average = catalog.average(run_id, name)
    if catalog.spec(run_id).request.recipe == NO_RECIPE:
        raise ConflictError(
            f"run {run_id} has no recipe, so nobody here can measure its loss; register the run with a recipe",
            code="no_recipe",
        )
    if average.served is None:
        raise NoAverageYetError(
            f"average {name!r} has no published weights yet; ask again once a checkpoint was folded and assessed"
        )


def landscape_resource(
    found: Job[LandscapeRecord, LandscapeResult], *, is_short: bool = False
) -> LandscapeResource:
    """A landscape as the API shows it; without its numbers when it is to be short."""
    record, result = found.record, found.result
    resource = LandscapeResource(
        landscape_id=record.landscape_id,
        kind=record.kind,
        points=record.points,
        state=found.state,
        progress=found.done,
        reason=_reason(result),
        generation=result.generation if result else None,
        created_at=record.created_at,
        finished_at=result.at if result else None,
    )
    return resource if result is None or is_short else resource.model_copy(update=_numbers(result, record.kind))


def _reason(result: LandscapeResult | None) -> Reason | None:
    if result is None or result.state == "succeeded":
        return None
    return Reason(code=result.code or "landscape_failed", message=result.message)


def _numbers(result: LandscapeResult, kind: str) -> dict[str, object]:
    rows = (result.heldout, result.train)
    losses, train_losses = rows if kind == "plane" else (found[0] if found else [] for found in rows)
    return {
        "axis": result.x,
        "axis_y": result.y,
        "losses": losses,
        "train_losses": train_losses,
        "markers": result.markers,
        "is_recalibrated": result.is_recalibrated,
        "num_heldout": result.num_heldout,
        "num_train": result.num_train,
    }
