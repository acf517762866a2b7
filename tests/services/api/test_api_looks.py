"""Looks at the bucket that many share: a budget of time for them, and one look for all who watch."""

from __future__ import annotations

import asyncio

import pytest

from services.api.state.budget import Budget
from services.api.state.watching import Watches
from wa_core.clock import ManualClock
from wa_core.errors import StoreUnavailableError


def test_a_budget_gives_way_when_looks_are_slow() -> None:
    """Quick looks are free, slow ones soon run out of time, and time brings them back."""
    clock = ManualClock()
    budget = Budget(share=0.1, most_s=1.0, clock=clock)

    def looks(cost_s: float) -> int:
        num = 0
        while num < 100 and budget.take():
            budget.spent(cost_s)
            num += 1
        return num

    assert looks(0.001) == 100
    assert looks(0.2) < 6
    clock.advance(60.0)
    assert 1 <= looks(0.2) < 6


def test_many_watchers_share_one_look() -> None:
    """A hundred who watch one thing have it looked at once each time, and all see the change."""
    num_looks = 0
    value = 1

    def look() -> int:
        nonlocal num_looks
        num_looks += 1
        return value

    async def watch(watches: Watches, ready: asyncio.Semaphore) -> int:
        async with watches.of("it", look, mark=lambda seen: seen) as watched:
            first = await watched.newer_than(0, timeout_s=60)
            version = watched.version
            ready.release()
            while (newer := await watched.newer_than(version, timeout_s=60)) is None:
                pass
            return (first or 0) * 10 + newer

    async def main() -> list[int]:
        nonlocal value
        watches, ready = Watches(), asyncio.Semaphore(0)
        watching = [asyncio.create_task(watch(watches, ready)) for _ in range(100)]
        for _ in watching:
            await ready.acquire()
        value = 2
        return await asyncio.gather(*watching)

    assert asyncio.run(main()) == [12] * 100
    assert num_looks < 50


@pytest.mark.parametrize("error", [StoreUnavailableError("away"), ZeroDivisionError("nobody foresaw this")])
def test_a_look_that_fails_is_told_to_those_who_watch(error: Exception) -> None:
    """Nobody waits for ever: an error in the shared look reaches each watcher, and the next one looks again."""

    def failing() -> int:
        raise error

    async def main() -> int:
        watches = Watches()
        async with watches.of("it", failing, mark=lambda seen: seen) as watched:
            with pytest.raises(Exception, match=r"away|went wrong"):
                await watched.newer_than(0, timeout_s=60)
        async with watches.of("it", lambda: 3, mark=lambda seen: seen) as watched:
            return await watched.newer_than(0, timeout_s=60) or 0

    assert asyncio.run(main()) == 3
