"""What became of every checkpoint in one average: folded, skipped, rejected, abandoned, or still to come. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.api.schemas import AverageResource, CheckpointResource
    from wa_core.records import AverageManifest

Fate = Literal["folded", "skipped", "rejected", "abandoned", "left", "waiting"]

MEANINGS: dict[Fate, str] = {
    "folded": "is in the average, with this coefficient",
    "skipped": "is not counted by the rule",
    "rejected": "was found to be damaged, and is in no average",
    "abandoned": "was left behind when training went back to an older step",
    "left": "was in the average, and has left its window",
    "waiting": "has not been looked at yet",
}


@dataclass(frozen=True, slots=True)
class Tick:
    """One checkpoint on the timeline."""

    checkpoint: CheckpointResource
    fate: Fate
    coefficient: float
    reason: str

    @property
    def meaning(self) -> str:
        """What its fate means."""
        return MEANINGS[self.fate]


def timeline(
    checkpoints: Sequence[CheckpointResource], average: AverageResource, manifest: AverageManifest | None
) -> list[Tick]:
    """Every checkpoint of a run in order, with its part in `average`, of which `manifest` is shown."""
    aside = {found.seq: found for found in (*average.rejected, *average.skipped)}
    return [
        Tick(
            checkpoint=checkpoint,
            fate=(fate := _fate(checkpoint, average, manifest)),
            coefficient=average.coefficients.get(checkpoint.step, 0.0) if fate == "folded" else 0.0,
            reason=f"{aside[checkpoint.seq].code}: {aside[checkpoint.seq].message}".rstrip(": ")
            if checkpoint.seq in aside
            else "",
        )
        for checkpoint in checkpoints
    ]


def _fate(checkpoint: CheckpointResource, average: AverageResource, manifest: AverageManifest | None) -> Fate:
    if checkpoint.is_abandoned:
        return "abandoned"
    if checkpoint.seq in {found.seq for found in average.rejected}:
        return "rejected"
    if checkpoint.seq in {found.seq for found in average.skipped}:
        return "skipped"
    if manifest is None or checkpoint.seq > manifest.cursor:
        return "waiting"
    return "folded" if checkpoint.step in average.coefficients else "left"
