"""Time in a simulation: the world's, which the schedule lets pass, and a machine's own view of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_BEGINNING = datetime(2026, 1, 1, tzinfo=UTC)


class WorldClock:
    """The true time. It passes only when the schedule says so."""

    def __init__(self) -> None:
        self.elapsed_s = 0.0

    def now(self) -> datetime:
        """The time, aware, in UTC."""
        return _BEGINNING + timedelta(seconds=self.elapsed_s)

    def monotonic(self) -> float:
        """Seconds since the beginning."""
        return self.elapsed_s

    def sleep(self, seconds: float) -> None:
        """Let time pass at once."""
        self.elapsed_s += seconds


class SkewedClock:
    """The world's clock, seen from a machine whose wall clock is off by some seconds."""

    def __init__(self, world: WorldClock) -> None:
        self._world = world
        self._off_s = 0.0

    def now(self) -> datetime:
        """What this machine believes the time to be."""
        return self._world.now() + timedelta(seconds=self._off_s)

    def monotonic(self) -> float:
        """Seconds that never go back, whatever happens to the wall clock."""
        return self._world.monotonic()

    def sleep(self, seconds: float) -> None:
        """Let the world's time pass at once."""
        self._world.sleep(seconds)

    def jump(self, seconds: float) -> None:
        """Set this machine's wall clock off by `seconds` more."""
        self._off_s += seconds
