"""Who acts next: actors are threads of which exactly one runs at any time, chosen by a seeded random source.

An actor hands over at every store operation. Nothing else decides the order, so a seed replays it. The schedule
knows no store and no averager; it keeps the invariant that all actors have ended when `run` returns.
"""

from __future__ import annotations

import threading
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from support.averaging import Crash

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from support.simulation.clocks import WorldClock

_STEP_S = 0.05  # simulated seconds that one step takes
_IDLE_S = (1.0, 20.0)  # and how many pass when nobody has anything to do


@dataclass(eq=False)
class Actor:
    """One simulated process (or its successor after a crash)."""

    name: str
    weight: float
    turn: threading.Lock = field(default_factory=threading.Lock)
    resumes_at: int = 0
    idle_since: int | None = None


class Schedule:
    """Runs actors one at a time.

    Args:
        chance: decides who is next.
        clock: advances with the steps.
        stickiness: how likely an actor goes on rather than hand over.
        nap_steps: for how long, at most, one who has nothing to do does not even look.
        max_steps: after so many steps the world counts as stuck.
    """

    def __init__(
        self, chance: random.Random, clock: WorldClock, *, stickiness: float, nap_steps: int, max_steps: int
    ) -> None:
        self.step = 0
        self.news = 0
        self.failure: str | None = None
        self._chance = chance
        self._clock = clock
        self._stickiness = stickiness
        self._nap_steps = nap_steps
        self._max_steps = max_steps
        self._is_stopping = False
        self._alive: list[Actor] = []
        self._late: list[tuple[int, Callable[[], None]]] = []
        self._main = threading.Lock()

    def add(self, name: str, body: Callable[[Actor], None], *, weight: float = 1.0) -> Actor:
        """Let another actor take part; its `body` starts when it is first chosen."""
        actor = Actor(name, weight)
        actor.turn.acquire()
        self._alive.append(actor)
        threading.Thread(target=self._live, args=(actor, body), name=name, daemon=True).start()
        return actor

    def run(self) -> None:
        """Let them all act until every one has ended, or the first failure."""
        self._main.acquire()
        self._pass_on()
        self._main.acquire()

    def hand_over(self, actor: Actor) -> None:
        """Let whoever chance chooses act; returns when it is this actor's turn again.

        Raises:
            Crash: the world is coming to its end.
        """
        chosen = self._choose(actor)
        if chosen is not actor:
            assert chosen is not None, "the one who asks is alive"
            chosen.turn.release()
            actor.turn.acquire()
        if self._is_stopping:
            raise Crash

    def pause(self, actor: Actor, *, steps: int) -> None:
        """Let `steps` steps go by without this actor, unless the others have nothing to do before."""
        actor.resumes_at = self.step + steps
        self.hand_over(actor)

    def idle(self, actor: Actor) -> None:
        """Wait a little, and then for news, or for time to pass."""
        actor.resumes_at = self.step + self._chance.randint(0, self._nap_steps)
        actor.idle_since = self.news
        self.hand_over(actor)
        actor.idle_since = None

    def later(self, act: Callable[[], None], *, steps: int) -> None:
        """Do something `steps` steps from now, whoever is still alive then."""
        self._late.append((self.step + steps, act))

    def fail(self, message: str) -> None:
        """Something is wrong: end the world. The first message is kept."""
        self.failure = self.failure or message
        self._is_stopping = True

    def _live(self, actor: Actor, body: Callable[[Actor], None]) -> None:
        actor.turn.acquire()
        try:
            if not self._is_stopping:
                body(actor)
        except Crash:
            pass
        except BaseException:  # noqa: BLE001  whatever a simulated process dies of is a finding
            self.fail(f"{actor.name} died:\n{traceback.format_exc()}")
        self._alive.remove(actor)
        self._pass_on()

    def _pass_on(self) -> None:
        chosen = self._choose(None)
        (chosen.turn if chosen else self._main).release()

    def _choose(self, current: Actor | None) -> Actor | None:
        """Who is next; None when all have ended."""
        while True:
            if self._is_stopping or not self._alive:
                return self._alive[0] if self._alive else None
            self._advance()
            step, news = self.step, self.news
            is_able = current is not None and current.resumes_at <= step and current.idle_since != news
            if is_able and self._chance.random() < self._stickiness:
                return current
            ready = [actor for actor in self._alive if actor.resumes_at <= step and actor.idle_since != news]
            if ready:
                return self._draw(ready)
            self._let_time_pass()

    def _draw(self, ready: list[Actor]) -> Actor:
        drawn = self._chance.random() * sum(actor.weight for actor in ready)
        for actor in ready:
            drawn -= actor.weight
            if drawn < 0:
                return actor
        return ready[-1]

    def _advance(self) -> None:
        self.step += 1
        self._clock.elapsed_s += _STEP_S
        if self.step > self._max_steps:
            self.fail(f"still not at the end after {self._max_steps} steps")
        if self._late and any(at <= self.step for at, _ in self._late):
            due = [act for at, act in self._late if at <= self.step]
            self._late = [(at, act) for at, act in self._late if at > self.step]
            for act in due:
                act()

    def _let_time_pass(self) -> None:
        """Nobody can act: go to when the next paused one resumes or late write arrives, or else wake the idle."""
        waits = [actor.resumes_at for actor in self._alive if actor.resumes_at > self.step]
        waits += [at for at, _ in self._late]
        if waits:
            self._clock.sleep(_STEP_S * (min(waits) - self.step))
            self.step = max(self.step, min(waits) - 1)
            return
        self._clock.sleep(self._chance.uniform(*_IDLE_S))
        for actor in self._alive:
            actor.idle_since = None
