"""A simulated process's way to the bucket: every operation is a turn in the schedule, and may go wrong."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from support.averaging import Crash
from support.simulation.weather import CRASHES, Trouble
from wa_core.errors import StoreUnavailableError, WeightAveragingError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from support.simulation.bucket import Bucket
    from support.simulation.clocks import SkewedClock
    from support.simulation.schedule import Actor, Schedule
    from support.simulation.weather import Weather
    from wa_core.store.base import Body, ByteRange, ObjectInfo

T = TypeVar("T")

MAX_PAUSE_STEPS = 150
Trace = list[tuple[int, str, str, str, str]]


class SimulatedStore:
    """One incarnation's store; when that has crashed, nothing it still tries reaches the bucket."""

    def __init__(
        self,
        bucket: Bucket,
        actor: Actor,
        *,
        schedule: Schedule,
        weather: Weather,
        chance: random.Random,
        clock: SkewedClock,
        trace: Trace,
        may_crash: bool,
    ) -> None:
        self._bucket = bucket
        self._actor = actor
        self._schedule = schedule
        self._weather = weather
        self._chance = chance
        self._clock = clock
        self._trace = trace
        self._may_crash = may_crash
        self._is_dead = False

    def get(self, key: str, range: ByteRange | None = None) -> bytes:
        """Read an object or a range of it."""
        return self._spoil(*self._turn("get", key, lambda: self._bucket.get(key, range=range)))

    def stream(self, key: str, start: int = 0, *, end: int | None = None) -> Iterator[bytes]:
        """Yield an object's bytes; all of them count as one operation, since no object ever changes."""
        body, trouble = self._turn("stream", key, lambda: b"".join(self._bucket.stream(key, start=start, end=end)))
        if trouble is Trouble.TRUNCATE:
            return self._broken(key, body)
        return iter((self._spoil(body, trouble),) if body else ())

    def head(self, key: str) -> ObjectInfo:
        """Say an object's size."""
        return self._turn("head", key, lambda: self._bucket.head(key))[0]

    def put(self, key: str, body: Body) -> None:
        """Write an object."""
        data = bytes(body) if isinstance(body, bytes | bytearray | memoryview) else body.read()
        self._turn("put", key, lambda: self._bucket.put(key, data))

    def create(self, key: str, body: bytes) -> None:
        """Write an object if its key is free."""
        self._turn("create", key, lambda: self._bucket.create(key, body))

    def list(self, prefix: str, start_after: str = "", *, delimiter: str | None = None) -> Iterator[ObjectInfo]:
        """Yield the objects under a prefix."""
        found = self._turn(
            "list",
            prefix,
            lambda: list(self._bucket.list(prefix, start_after=start_after, delimiter=delimiter)),
        )
        return iter(found[0])

    def delete(self, key: str) -> None:
        """Remove an object if it is there."""
        self._turn("delete", key, lambda: self._bucket.delete(key))

    def presign(self, key: str, *, expires_s: int) -> str | None:
        """A simulated bucket has no URL."""
        return None

    def _turn(self, operation: str, key: str, act: Callable[[], T]) -> tuple[T, Trouble | None]:
        """Let others go first, then act, with whatever befalls it."""
        if self._is_dead:
            raise Crash
        self._schedule.hand_over(self._actor)
        trouble = self._weather.draw(operation, key, may_crash=self._may_crash)
        self._trace.append((self._schedule.step, self._actor.name, operation, key, trouble or ""))
        if trouble is None:
            return act(), None
        if trouble in CRASHES:
            self._is_dead = True
            if trouble is Trouble.CRASH_AFTER:
                _unheard(act)
            raise Crash
        if trouble in {Trouble.LOSE_REQUEST, Trouble.LOSE_RESPONSE, Trouble.LATE}:
            if trouble is Trouble.LOSE_RESPONSE:
                _unheard(act)
            elif trouble is Trouble.LATE:
                self._schedule.later(lambda: _unheard(act), steps=self._chance.randint(1, MAX_PAUSE_STEPS))
            raise StoreUnavailableError(f"{operation} {key}: {trouble} (on purpose)")
        if trouble is Trouble.PAUSE:
            self._schedule.pause(self._actor, steps=self._chance.randint(1, MAX_PAUSE_STEPS))
        elif trouble is Trouble.CLOCK_JUMP:
            self._clock.jump(self._chance.uniform(-7200, 7200))
        return act(), trouble

    def _spoil(self, body: bytes, trouble: Trouble | None) -> bytes:
        if trouble is Trouble.TRUNCATE:
            raise StoreUnavailableError("the answer was cut (on purpose)")
        if trouble is not Trouble.FLIP or not body:
            return body
        spoiled = bytearray(body)
        at = self._chance.randrange(8 * len(body))
        spoiled[at // 8] ^= 1 << (at % 8)
        return bytes(spoiled)

    def _broken(self, key: str, body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        raise StoreUnavailableError(f"{key}: the connection ended early (on purpose)")


def _unheard(act: Callable[[], object]) -> None:
    with suppress(WeightAveragingError):
        act()
