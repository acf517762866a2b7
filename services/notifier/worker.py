"""Tells webhooks: at least once, until the receiver takes it or a day is over (ADR 22).

An event is sent first and written down as told afterwards. So a notifier that dies in between, or a second one
beside it, sends a message twice, under the same id, and none is ever lost. It holds no lease and keeps no state.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import Future
from typing import TYPE_CHECKING

import structlog
from structlog.contextvars import bound_contextvars

from services.notifier import telemetry
from services.notifier.sender import UndeliverableError
from services.notifier.signature import headers_of
from services.notifier.teller import Answer, Teller
from wa_core.catalog.deliveries import commit_delivery, list_telling, unmark_telling
from wa_core.catalog.runs import list_active
from wa_core.errors import RunNotFoundError, StoreAuthError, TransientError, WeightAveragingError
from wa_core.records import Delivery

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Literal, Protocol

    from services.notifier.teller import Message
    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

    class Post(Protocol):
        """Posts a message; see `services.notifier.sender.Sender.post`."""

        def __call__(self, url: str, body: bytes, *, headers: Mapping[str, str]) -> int:
            """Post it, and return the answer's status."""
            ...


log = structlog.get_logger(__name__)

FIRST_WAIT_S = 5.0
LONGEST_WAIT_S = 4 * 3600.0
GIVE_UP_AFTER_S = 24 * 3600.0
MAX_IN_FLIGHT = 16
MAX_PER_HOST = 4
TROUBLE_PAUSE_S = 60.0
_PATIENCE_S = 1.0  # a tick must not hang on an absent store; what is not written down now is at the next one
_OK = range(200, 300)
_GONE = 410
_AGENT = "weight-averaging"


class Notifier:
    """See the module. `tick` does whatever is due, and says whether anything was.

    Args:
        store: the bucket.
        post: sends one message.
        key: what messages are signed with.
        clock: the time.
        public_url: what links begin with.
        jitter: a random number in [0, 1), for the waits between tries.
        look_interval_s: how often the bucket is looked at.
    """

    def __init__(
        self,
        store: ObjectStore,
        *,
        post: Post,
        key: bytes,
        clock: Clock,
        public_url: str = "",
        jitter: Callable[[], float] = random.random,
        look_interval_s: float = 2.0,
    ) -> None:
        self._store = store
        self._post = post
        self._key = key
        self._clock = clock
        self._public_url = public_url.rstrip("/")
        self._jitter = jitter
        self._look_interval_s = look_interval_s
        self._tellers: dict[str, Teller] = {}
        self._paused_until: dict[str, float] = {}
        self._looked_at = float("-inf")
        self._got_on_at = clock.monotonic()

    def idle_s(self) -> float:
        """How many seconds ago a tick ended well; may be asked from any thread."""
        return self._clock.monotonic() - self._got_on_at

    @property
    def num_in_flight(self) -> int:
        """How many messages are being sent, or were and are not yet written down."""
        return sum(message.answer is not None for message in self._pending())

    def tick(self) -> bool:
        """Write down how tries went, read what is new, and begin what is due.

        Raises:
            TransientError: the store is away; nothing is forgotten, and nothing is sent again for it.
        """
        num_settled = self._settle()
        now = self._clock.monotonic()
        if now - self._looked_at >= self._look_interval_s:
            self._look()
            self._looked_at = now
        num_begun = self._begin_due()
        self._observe()
        return num_settled + num_begun > 0

    def close(self, *, grace_s: float = 5.0) -> None:
        """Give what is being sent a moment, and write down how it went; the rest is sent again by the next one."""
        deadline = time.monotonic() + grace_s
        while self.num_in_flight and time.monotonic() < deadline:
            self._settle()
            time.sleep(0.05)

    # -- what there is to tell ----------------------------------------------------------------------------

    def _look(self) -> None:
        active = set(list_active(self._store))  # first: what ended a run's activity is then there to be read
        telling = set(list_telling(self._store))
        self._tellers = {run_id: teller for run_id, teller in self._tellers.items() if run_id in telling}
        for run_id in sorted(telling):
            if self._clock.monotonic() >= self._paused_until.get(run_id, 0.0):
                with bound_contextvars(run_id=run_id):
                    self._look_at(run_id, is_active=run_id in active)

    def _look_at(self, run_id: str, *, is_active: bool) -> None:
        try:
            if run_id not in self._tellers:
                made = Teller(self._store, run_id, clock=self._clock, public_url=self._public_url)
                self._tellers[run_id] = made
            teller = self._tellers[run_id]
            teller.look()
            if teller.is_over and not is_active:
                unmark_telling(self._store, teller.spec)
        except (TransientError, StoreAuthError):
            raise
        except RunNotFoundError:
            pass  # a marker whose submission has not got further, or never will
        except WeightAveragingError as error:
            self._paused_until[run_id] = self._clock.monotonic() + TROUBLE_PAUSE_S
            log.warning("run_unreadable", code=error.code, error=error.message, retry_in_s=TROUBLE_PAUSE_S)

    # -- sending ------------------------------------------------------------------------------------------

    def _begin_due(self) -> int:
        now, hosts = self._clock.monotonic(), Counter(m.host for m in self._pending() if m.answer is not None)
        num_begun = 0
        for message in self._pending():
            is_due = message.answer is None and message.due_at <= now
            if is_due and hosts.total() < MAX_IN_FLIGHT and hosts[message.host] < MAX_PER_HOST:
                hosts[message.host] += 1
                num_begun += 1
                message.num_tries += 1
                answer: Future[Answer] = Future()
                message.answer = answer
                threading.Thread(target=self._send, args=(message, answer), name="webhook", daemon=True).start()
        return num_begun

    def _send(self, message: Message, answer: Future[Answer]) -> None:
        """In a thread of its own: a receiver may be slow, and one that hangs must not keep this process alive."""
        body = message.event.body
        stamp = int(self._clock.now().timestamp())
        headers = {"Content-Type": "application/json", "User-Agent": _AGENT}
        headers |= headers_of(self._key, message_id=message.message_id, timestamp=stamp, body=body)
        try:
            with telemetry.SEND_SECONDS.time():
                answer.set_result(Answer(self._post(message.url, body, headers=headers)))
        except UndeliverableError as error:
            answer.set_result(Answer(None, str(error)))
        except (
            Exception
        ) as error:  # the outermost loop of a thread: without an answer it would never be tried again
            log.exception("webhook_failed", run_id=message.run_id, host=message.host)
            answer.set_result(Answer(None, type(error).__name__))

    # -- how it went --------------------------------------------------------------------------------------

    def _settle(self) -> int:
        num_settled = 0
        for message in self._pending():
            if message.answer is not None and message.answer.done():
                self._settle_one(message, message.answer.result())
                num_settled += 1
        return num_settled

    def _settle_one(self, message: Message, answer: Answer) -> None:
        age_s = (self._clock.now() - message.event.at).total_seconds()
        if answer.status in _OK:
            self._write_down(message, answer, outcome="delivered")
        elif answer.status == _GONE or age_s > GIVE_UP_AFTER_S:
            self._write_down(message, answer, outcome="given_up")
        else:
            longest_s = min(FIRST_WAIT_S * 4 ** (message.num_tries - 1), LONGEST_WAIT_S)
            wait_s = longest_s * (0.5 + self._jitter() / 2)  # so that those that failed together come apart
            message.due_at = self._clock.monotonic() + wait_s
            message.answer = None
            telemetry.TRIES.labels("failed").inc()
            log.warning("webhook_failed", **_said(message, answer), retry_in_s=round(wait_s, 1))

    def _write_down(self, message: Message, answer: Answer, *, outcome: Literal["delivered", "given_up"]) -> None:
        delivery = Delivery(
            run_id=message.run_id,
            webhook=message.webhook,
            event_id=message.event.event_id,
            at=self._clock.now(),
            outcome=outcome,
            status=answer.status,
            message=answer.message,
            num_tries=message.num_tries,
        )
        commit_delivery(self._store, delivery, patience_s=_PATIENCE_S)
        self._tellers[message.run_id].pending.remove(message)
        telemetry.TRIES.labels(outcome).inc()
        log.info("webhook_told", outcome=outcome, **_said(message, answer))

    def _pending(self) -> list[Message]:
        return [message for teller in self._tellers.values() for message in teller.pending]

    def _observe(self) -> None:
        pending, now = self._pending(), self._clock.now()
        oldest_s = max(((now - message.event.at).total_seconds() for message in pending), default=0.0)
        telemetry.PENDING.set(len(pending))
        telemetry.OLDEST_SECONDS.set(max(0.0, oldest_s))
        self._got_on_at = self._clock.monotonic()


def _said(message: Message, answer: Answer) -> dict[str, object]:
    return {
        "run_id": message.run_id,
        "webhook_id": message.message_id,
        "host": message.host,
        "num_tries": message.num_tries,
        "status": answer.status,
        "error": answer.message,
    }
