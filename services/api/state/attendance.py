"""Whether an averager is at work on a run: its note in the bucket keeps changing, or says what is wrong.

No clock but this process's own is trusted (ADR 13): a note is judged by how long it has been seen unchanged. So a
replica that has just been started says nothing for a while. Knows neither the bucket nor what is due.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.api.state.snapshots import Stall

if TYPE_CHECKING:
    from wa_core.clock import Clock
    from wa_core.records import Heartbeat

PATIENCE_S = 30.0

_NOBODY = Stall(
    code="no_averager",
    message=f"no averager has given a sign of life for this run for {PATIENCE_S:.0f} s; start one, or see its log",
)


class Attendance:
    """What was seen of one run's averager while there was something to do."""

    def __init__(self) -> None:
        self._seen: Heartbeat | None = None
        self._since: float | None = None

    def rest(self) -> None:
        """There is nothing to do, so nobody need be there."""
        self._since = None

    def look(self, beat: Heartbeat | None, *, clock: Clock) -> Stall | None:
        """What keeps due work from being done, given the averager's newest note; None: nothing known."""
        now = clock.monotonic()
        if self._since is None or beat != self._seen:
            self._seen, self._since = beat, now
        if beat is not None and beat.reason:
            return Stall(code=beat.reason, message=beat.detail)
        return _NOBODY if now - self._since >= PATIENCE_S else None
