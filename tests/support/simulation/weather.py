"""What goes wrong in one simulation, and how often: drawn once per seed, so that seeds differ in kind.

Some seeds only crash, some only lose answers, some do everything at once (swarm testing: Groce et al. 2012).
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random


class Trouble(StrEnum):
    """What can befall one store operation."""

    LOSE_REQUEST = "lose_request"
    """Nothing happens; the caller hears that the store is away."""
    LOSE_RESPONSE = "lose_response"
    """It happens; the caller hears that the store is away."""
    LATE = "late"
    """The caller hears that the store is away; the write happens some time later (a reordered request)."""
    CRASH_BEFORE = "crash_before"
    """The process dies; nothing has happened."""
    CRASH_AFTER = "crash_after"
    """It happens; the process dies before it hears of it."""
    PAUSE = "pause"
    """The process stops with the request on its way, and goes on with what it knew (a zombie)."""
    TRUNCATE = "truncate"
    """A read breaks half-way."""
    FLIP = "flip"
    """One bit of a weights file that is read arrives wrong."""
    CLOCK_JUMP = "clock_jump"
    """The caller's wall clock is set up to two hours off; the operation is sound."""


CRASHES = frozenset({Trouble.CRASH_BEFORE, Trouble.CRASH_AFTER})
_BODIES = frozenset({"get", "stream"})
_READS = _BODIES | {"head", "list"}
_WRITES_ONLY = frozenset({Trouble.LATE})
_FLIPS_PER_KEY = 2  # a third one in a row would rightly be taken for a corrupt object
_MAX_TROUBLES = 12


class Weather:
    """Draws troubles until their number is used up.

    Args:
        chance: the seeded random source.
    """

    def __init__(self, chance: random.Random) -> None:
        self.num_left = chance.choice((0, 1, 2, 3, 4, 6, 8, _MAX_TROUBLES))
        self.happened: Counter[Trouble] = Counter()
        self._chance = chance
        kinds = list(Trouble)
        self._kinds = chance.sample(kinds, chance.randint(1, len(kinds)))
        self._rate = chance.choice((0.02, 0.05, 0.1, 0.25))
        self._flips: Counter[str] = Counter()

    def draw(self, operation: str, key: str, *, may_crash: bool) -> Trouble | None:
        """What befalls this operation, if anything."""
        # Reads of weights are few among all operations, and what can go wrong with them is of a kind of its own.
        is_weights = operation in _BODIES and key.endswith(".safetensors")
        if not self.num_left or self._chance.random() >= self._rate * (4 if is_weights else 1):
            return None
        possible = [kind for kind in self._kinds if self._fits(kind, operation, key, may_crash=may_crash)]
        if not possible:
            return None
        trouble = self._chance.choice(possible)
        self.num_left -= 1
        self.happened[trouble] += 1
        self._flips[key] += trouble is Trouble.FLIP
        return trouble

    def _fits(self, trouble: Trouble, operation: str, key: str, *, may_crash: bool) -> bool:
        if trouble in CRASHES:
            return may_crash
        if trouble is Trouble.FLIP:
            return operation in _BODIES and key.endswith(".safetensors") and self._flips[key] < _FLIPS_PER_KEY
        if trouble is Trouble.TRUNCATE:
            return operation in _BODIES
        return not (trouble in _WRITES_ONLY and operation in _READS)
