"""Hard times for a run: averagers killed and stopped at random, the store killed at its pace, checkpoints coming.

Real parts all through: SeaweedFS, `python -m services.averager`, SIGKILL and SIGSTOP.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from support.nursery import READY
from support.trained import TrainedRun
from support.workers import Workers, averager_settings

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from support.nursery import AveragerProcess
    from support.seaweed import Seaweed


@dataclass(frozen=True, slots=True)
class Hardship:
    """What is done to a run. Zeros leave it in peace.

    Attributes:
        num_averagers: how many work at a time; one that is killed is replaced at once.
        strike_every_s: from one SIGKILL or SIGSTOP of a random averager to the next, on average; 0 for never.
        stop_s: the shortest and the longest time that one is stopped; times in between come evenly by magnitude.
        kill_store_every_s: from one SIGKILL of the store to the next; 0 for never.
        checkpoint_every_s: how long training takes from one checkpoint to the next, at least.
    """

    num_averagers: int = 3
    strike_every_s: float = 3.0
    stop_s: tuple[float, float] = (0.5, 30.0)
    kill_store_every_s: float = 8.0
    checkpoint_every_s: float = 0.0


@dataclass
class Soak:
    """A soak that is over.

    Attributes:
        run: the run, succeeded.
        took_s: from the first checkpoint's commit to the run's success.
        happened: how often what was done.
    """

    run: TrainedRun
    took_s: float
    happened: Counter[str] = field(default_factory=Counter)


def soak(
    seaweed: Seaweed,
    folder: Path,
    *,
    steps: Iterable[int],
    hardship: Hardship,
    seed: int = 0,
    is_backlog: bool = False,
    timeout_s: float = 1200.0,
) -> Soak:
    """Train and average a run under hardship.

    Args:
        seaweed: the store's server.
        folder: for logs and scratch.
        steps: a checkpoint is committed for each.
        hardship: what is done meanwhile.
        seed: decides whom it befalls, and when.
        is_backlog: commit everything before the averagers start; the time taken is then that of averaging alone.
        timeout_s: how long the run may take to succeed after its last checkpoint.

    Raises:
        AssertionError: it has not succeeded within `timeout_s` of the last checkpoint.
    """
    store = seaweed.new_store()
    run = TrainedRun(store)
    if is_backlog:
        run.train(steps)
    settings = averager_settings(seaweed, endpoint_url=seaweed.endpoint_url, bucket=store.bucket)
    with Workers(folder, settings) as workers:
        fate = _Fate(seaweed, workers, hardship, chance=random.Random(seed))
        began = time.monotonic()

        def live_through() -> None:
            fate.strike_if_due()
            time.sleep(hardship.checkpoint_every_s)

        if not is_backlog:
            run.train(steps, meanwhile=live_through)
        run.finish()
        run.wait_until_succeeded(timeout_s=timeout_s, meanwhile=fate.strike_if_due)
        return Soak(run, time.monotonic() - began, fate.happened)


class _Fate:
    """Strikes when it is time."""

    def __init__(self, seaweed: Seaweed, workers: Workers, hardship: Hardship, *, chance: random.Random) -> None:
        self.happened: Counter[str] = Counter()
        self._seaweed = seaweed
        self._workers = workers
        self._hardship = hardship
        self._chance = chance
        self._averagers = [workers.start() for _ in range(hardship.num_averagers)]
        for averager in self._averagers:
            averager.wait_until_ready()
        self._stopped: dict[AveragerProcess, float] = {}
        self._strike_at = self._kill_store_at = time.monotonic()
        self._postpone_strike()
        self._postpone_store_kill()

    def strike_if_due(self) -> None:
        """Kill, stop or wake what it is time to."""
        now = time.monotonic()
        for averager in [stopped for stopped, until in self._stopped.items() if until <= now]:
            del self._stopped[averager]
            averager.go_on()
        if now >= self._strike_at:
            victim = self._chance.choice(self._averagers)
            if victim.said(READY):  # of those killed while they start, nothing would ever come on a slow machine
                self._strike(victim)
            self._postpone_strike()
        if now >= self._kill_store_at:
            self._seaweed.kill()
            self._seaweed.start()
            self.happened["store killed"] += 1
            self._postpone_store_kill()

    def _strike(self, victim: AveragerProcess) -> None:
        if self._chance.random() < 0.5:
            self._stopped.pop(victim, None)
            self._workers.kill(victim)
            self._averagers[self._averagers.index(victim)] = self._workers.start()
            self.happened["averager killed"] += 1
        elif victim not in self._stopped:
            victim.stop()
            shortest, longest = self._hardship.stop_s
            lasts_s = math.exp(self._chance.uniform(math.log(shortest), math.log(longest)))
            self._stopped[victim] = time.monotonic() + lasts_s
            self.happened["averager stopped"] += 1

    def _postpone_strike(self) -> None:
        pace = self._hardship.strike_every_s
        self._strike_at = time.monotonic() + self._chance.uniform(0.5, 1.5) * pace if pace else math.inf

    def _postpone_store_kill(self) -> None:
        pace = self._hardship.kill_store_every_s
        self._kill_store_at = time.monotonic() + pace if pace else math.inf
