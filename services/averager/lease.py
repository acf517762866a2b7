"""Who works on a run: a note in the bucket that saves averagers from doing each other's work.

Advice, never the truth: two averagers that both think a run theirs do no harm, since generations are created once
and the loser is fenced. So nothing here is locked, and no clock is trusted: a holder is alive while its note keeps
changing, by the reader's own monotonic clock; the times in it only let a reader take an obviously old one at once.
"""

from __future__ import annotations

import os
import secrets
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from pydantic import ValidationError

from wa_core import layout
from wa_core.errors import ObjectNotFoundError
from wa_core.records import AVERAGER, Heartbeat

if TYPE_CHECKING:
    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

RENEW_EVERY_S = 2.0
LIFETIME_S = 10.0


class Worker:
    """One averager's name: which machine, which process, and a random part, since both come again."""

    def __init__(self) -> None:
        self.host = socket.gethostname()
        self.pid = os.getpid()
        self.name = f"{self.host}/{self.pid}/{secrets.token_hex(4)}"

    def knows_to_be_dead(self, name: str) -> bool:
        """Whether another averager ran on this machine and does no more."""
        host, _, rest = name.partition("/")
        pid = rest.partition("/")[0]
        if name == self.name or host != self.host or not pid.isdecimal():
            return False
        if int(pid) == self.pid:
            return True
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False


class Lease:
    """One worker's view of who works on one run."""

    def __init__(self, store: ObjectStore, run_id: str, *, worker: Worker, clock: Clock) -> None:
        self._store = store
        self._key = layout.heartbeat(run_id, AVERAGER)
        self._worker = worker
        self._clock = clock
        self._is_held = False
        self._looked_at = self._renewed_at = float("-inf")
        self._seen: bytes | None = None
        self._seen_since = float("-inf")

    def hold(self, *, attempt: int = 0, detail: str = "") -> bool:
        """Whether the run is ours to work on; takes it when nobody is at it, and renews it when it is time.

        Raises:
            TransientError: the store is away.
        """
        now = self._clock.monotonic()
        if self._is_held and now - self._renewed_at < RENEW_EVERY_S:
            return True
        if not self._is_held and now - self._looked_at < RENEW_EVERY_S:
            return False
        self._looked_at = now
        self._is_held = self._is_free(now)
        if self._is_held:
            self._renewed_at = now
            self._write(Heartbeat(who=self._worker.name, at=self._clock.now(), attempt=attempt, detail=detail))
        return self._is_held

    def report(self, *, reason: str, detail: str) -> None:
        """If the run is ours, say what keeps it from getting on."""
        if self._is_held:
            self._write(Heartbeat(who=self._worker.name, at=self._clock.now(), reason=reason, detail=detail))

    def release(self) -> None:
        """Let others have the run at once."""
        if self._is_held:
            self._is_held = False
            self._write(Heartbeat(who="", at=self._clock.now(), detail="released"))

    def _is_free(self, now: float) -> bool:
        try:
            body = self._store.get(self._key)
            beat = Heartbeat.model_validate_json(body)
        except (ObjectNotFoundError, ValidationError):
            return True
        if beat.who in ("", self._worker.name) or self._worker.knows_to_be_dead(beat.who):
            return True
        if body != self._seen:
            self._seen, self._seen_since = body, now
        is_old = beat.at + timedelta(seconds=LIFETIME_S) < self._clock.now()
        return is_old or now - self._seen_since >= LIFETIME_S

    def _write(self, beat: Heartbeat) -> None:
        self._store.put(self._key, beat.model_dump_json().encode())
