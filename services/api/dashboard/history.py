"""An average's assessed generations, oldest first, with what each measured and how long it took to come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from services.api.catalog import Catalog
    from services.api.schemas import CheckpointResource
    from wa_core.records import Assessment

#: As many as a chart can show; of a longer history the newest.
MAX_SHOWN = 500


@dataclass(frozen=True, slots=True)
class Published:
    """One generation that can be downloaded."""

    generation: int
    step: int
    n_averaged: int
    published_at: datetime
    lag_s: float | None
    assessment: Assessment

    def metric(self, side: str, name: str) -> float | None:
        """A metric of the ``raw`` or the ``averaged`` weights."""
        found = getattr(self.assessment, side)
        return found.metrics.get(name) if found else None


def history(
    catalog: Catalog, run_id: str, name: str, checkpoints: Sequence[CheckpointResource]
) -> list[Published]:
    """The newest `MAX_SHOWN` assessed generations of an average, oldest first."""
    committed_at = {checkpoint.step: checkpoint.created_at for checkpoint in checkpoints}
    found = []
    for number in catalog.assessed_numbers(run_id, name)[-MAX_SHOWN:]:
        record = catalog.assessment(run_id, name, number)
        manifest = catalog.generation(run_id, name, number)
        if record is None or manifest.last_step is None:
            continue
        committed = committed_at.get(manifest.last_step)
        found.append(
            Published(
                generation=number,
                step=manifest.last_step,
                n_averaged=manifest.n_averaged,
                published_at=record.at,
                lag_s=(record.at - committed).total_seconds() if committed else None,
                assessment=record.assessment,
            )
        )
    return found


def metric_names(generations: Sequence[Published]) -> list[str]:
    """The held-out metrics that any of them has, ``loss`` first."""
    names = {
        name
        for found in generations
        for measured in (found.assessment.raw, found.assessment.averaged)
        if measured
        for name in measured.metrics
    }
    return sorted(names, key=lambda name: (name != "loss", name))
