"""How much of its time the API spends on looking again at what it has seen a moment ago.

While requests are few, each gets a new look. When looks become many or slow, the time for them runs out, and
callers are given what was seen just before: so no number of callers makes the service read one thing for ever.
Knows nothing of what is looked at.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wa_core.clock import Clock

_RESERVE = 4  # looks that must be affordable before one is made: a slow one is not begun with the last of the time
_FORGET = 0.97  # a second: what was slow once is tried again within a minute or two
_FIRST_GUESS_S = 0.002


class Budget:
    """Seconds of looking: `share` of each second comes in, up to `most_s`. Safe for threads."""

    def __init__(self, *, share: float, most_s: float, clock: Clock) -> None:
        self._share = share
        self._most_s = most_s
        self._clock = clock
        self._left_s = most_s
        self._expected_s = _FIRST_GUESS_S
        self._at = clock.monotonic()
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Whether a look may be made now; its expected time is then set aside, until `spent` says more."""
        with self._lock:
            self._let_time_pass()
            if self._left_s < _RESERVE * self._expected_s:
                return False
            self._left_s -= self._expected_s
            return True

    def spent(self, seconds: float) -> None:
        """A look took so long."""
        with self._lock:
            self._left_s = max(self._left_s - (seconds - self._expected_s), -self._most_s)
            self._expected_s = max(seconds, (self._expected_s + seconds) / 2, 1e-5)

    def _let_time_pass(self) -> None:
        now = self._clock.monotonic()
        passed_s, self._at = now - self._at, now
        self._left_s = min(self._left_s + self._share * passed_s, self._most_s)
        self._expected_s *= _FORGET**passed_s
