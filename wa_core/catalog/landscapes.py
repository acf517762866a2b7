"""The loss landscapes of an average, as jobs (ADR 26)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wa_core.catalog.jobs import Jobs
from wa_core.records import LandscapeAttempt, LandscapeRecord, LandscapeResult

if TYPE_CHECKING:
    from wa_core.clock import Clock
    from wa_core.records import LandscapeRequest


class Landscapes(Jobs[LandscapeRecord, LandscapeAttempt, LandscapeResult]):
    """The landscapes of one average."""

    kind = "landscapes"
    noun = "landscape"
    record_type = LandscapeRecord
    attempt_type = LandscapeAttempt
    result_type = LandscapeResult

    def ask(self, wanted: LandscapeRequest, *, clock: Clock) -> LandscapeRecord:
        """Ask for a landscape.

        Raises:
            ConflictError: the average has too many (`too_many_landscapes`).
        """
        return self._ask(clock=clock, kind=wanted.kind, points=wanted.num_points)
