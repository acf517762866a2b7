"""What became of every checkpoint in one average: folded, skipped, rejected, abandoned, or still to come. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.api.schemas import AverageResource, CheckpointResource
    from wa_core.records import AverageManifest, SetAside

Fate = Literal["folded", "skipped", "rejected", "abandoned", "left", "waiting"]


@dataclass(frozen=True, slots=True)
class Tick:
    """One checkpoint on the timeline."""

    checkpoint: CheckpointResource
    fate: Fate
    coefficient: float = 0.0
    reason: str = ""


def timeline(
    checkpoints: Sequence[CheckpointResource], average: AverageResource, manifest: AverageManifest | None
) -> list[Tick]:
    """Every checkpoint of a run in order, with its part in `average`, of which `manifest` is shown."""
    aside: dict[int, tuple[Fate, SetAside]] = {found.seq: ("skipped", found) for found in average.skipped}
    aside |= {found.seq: ("rejected", found) for found in average.rejected}
    cursor = manifest.cursor if manifest else 0
    return [_tick(checkpoint, average, aside.get(checkpoint.seq), cursor=cursor) for checkpoint in checkpoints]


def _tick(
    checkpoint: CheckpointResource, average: AverageResource, aside: tuple[Fate, SetAside] | None, *, cursor: int
) -> Tick:
    coefficient = average.coefficients.get(checkpoint.step)
    if checkpoint.is_abandoned:
        return Tick(checkpoint, "abandoned")
    if aside is not None:
        fate, found = aside
        return Tick(checkpoint, fate, reason=f"{found.code}: {found.message}".rstrip(": "))
    if checkpoint.seq > cursor:
        return Tick(checkpoint, "waiting")
    return Tick(checkpoint, "left") if coefficient is None else Tick(checkpoint, "folded", coefficient)
