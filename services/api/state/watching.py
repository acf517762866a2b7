"""One look for everybody who watches the same thing: a task that looks twice a second while somebody watches.

However many clients follow a run, the bucket is asked about it once. Lives in the event loop; knows no HTTP and
nothing of what is watched.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import structlog
from starlette.concurrency import run_in_threadpool

from services.api.problems import unforeseen
from wa_core.errors import WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Hashable

log = structlog.get_logger(__name__)

T = TypeVar("T")

POLL_S = 0.5
_POLL_EACH_S = 0.01  # many watched things are looked at less often, so that looking stays affordable
_SLOWEST_POLL_S = 1.5


class Watched(Generic[T]):
    """What is watched. `value` is None until the first look; `version` goes up with each change."""

    def __init__(self) -> None:
        self.value: T | None = None
        self.version = 0
        self.error: WeightAveragingError | None = None
        self.num_watchers = 0
        self._changed = asyncio.Event()

    async def newer_than(self, version: int, *, timeout_s: float) -> T | None:
        """The value once it is newer than `version`, or None when it was not within `timeout_s`.

        Raises:
            WeightAveragingError: looking has failed; nobody looks any more.
        """
        if self.version <= version and self.error is None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout_s)
        if self.error is not None:
            raise self.error
        return self.value if self.version > version else None

    def set(self, value: T) -> None:
        """Tell everybody who waits."""
        self.value, self.version = value, self.version + 1
        self._wake()

    def fail(self, error: WeightAveragingError) -> None:
        """Tell everybody who waits that nothing more will come."""
        self.error = error
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Watches:
    """All that is being watched in one event loop."""

    def __init__(self) -> None:
        self._watched: dict[Hashable, tuple[Watched[Any], asyncio.Task[None]]] = {}

    @asynccontextmanager
    async def of(
        self, key: Hashable, look: Callable[[], T], *, mark: Callable[[T], object]
    ) -> AsyncIterator[Watched[T]]:
        """Watch what `look` (in a thread) sees under `key`; it has changed when its `mark` has."""
        known = self._watched.get(key)
        if known is None or known[0].error is not None:
            new: Watched[T] = Watched()
            known = self._watched[key] = (new, asyncio.create_task(self._keep_looking(new, look, mark)))
        watched, task = known
        watched.num_watchers += 1
        try:
            yield watched
        finally:
            watched.num_watchers -= 1
            if watched.num_watchers == 0:
                task.cancel()
                if self._watched.get(key) is known:
                    del self._watched[key]

    async def _keep_looking(self, watched: Watched[T], look: Callable[[], T], mark: Callable[[T], object]) -> None:
        last: object = None
        while True:
            try:
                value = await run_in_threadpool(look)
            except WeightAveragingError as error:
                watched.fail(error)
                return
            except Exception:  # the outermost loop of a task: those who wait must be told
                log.exception("watching_failed")
                watched.fail(unforeseen())
                return
            if watched.version == 0 or mark(value) != last:
                last = mark(value)
                watched.set(value)
            await asyncio.sleep(min(max(POLL_S, _POLL_EACH_S * len(self._watched)), _SLOWEST_POLL_S))
