"""Advisory records: heartbeats and markers. They may be lost, late or wrong, and nothing depends on them."""

from __future__ import annotations

from pydantic import AwareDatetime, Field

from wa_core.records.base import Record

#: Whose heartbeat says why a run waits; its runner writes it.
WAITING = "waiting"

#: Whose heartbeat says that an averager is at work on a run, or what keeps it from getting on.
AVERAGER = "averager"


class Heartbeat(Record):
    """A sign of life; advisory, overwritten, never the truth. `reason` is a code: why a run waits or stalls."""

    who: str
    at: AwareDatetime
    attempt: int = 0
    step: int | None = None
    total_steps: int | None = None
    steps_per_s: float | None = None
    epoch: int | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    detail: str = ""
    reason: str = ""


class Marker(Record):
    """Says that a run waits (`queue/`) or is under way (`active/`), so that nobody must read every run."""

    run_id: str
    at: AwareDatetime
