"""One run with webhooks: what there is to tell, less what has been told.

It reads the run's log and its averages' assessments a little further each time, and keeps what is pending in
memory; what has been told is in the bucket, so another teller of the same run begins where this one ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from services.notifier.events import of_assessment, of_entry
from wa_core.catalog.averages import Generations
from wa_core.catalog.deliveries import average_event_id, list_deliveries
from wa_core.catalog.runs import RunLog, fetch_spec, requested_averages

if TYPE_CHECKING:
    from concurrent.futures import Future

    from services.notifier.events import Event
    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore


@dataclass(frozen=True, slots=True)
class Answer:
    """How one try went: the receiver's status, or why there is none."""

    status: int | None
    message: str = ""


@dataclass(slots=True)
class Message:
    """One event for one webhook. `due_at` is monotonic time; `answer` is there while a try is under way."""

    run_id: str
    webhook: int
    url: str
    event: Event
    due_at: float
    num_tries: int = 0
    answer: Future[Answer] | None = None

    @property
    def message_id(self) -> str:
        """The same at every try: by it a receiver tells that it has seen the message before."""
        return f"{self.run_id}-{self.webhook}-{self.event.event_id}"

    @property
    def host(self) -> str:
        """Where it goes; all of the address that logs may show."""
        return urlsplit(self.url).hostname or ""


class Teller:
    """See the module.

    Args:
        store: the bucket.
        run_id: the run.
        clock: the time.
        public_url: what links begin with.

    Raises:
        RunNotFoundError: there is no such run, or not yet.
        TransientError: the store is away.
    """

    def __init__(self, store: ObjectStore, run_id: str, *, clock: Clock, public_url: str) -> None:
        self.run_id = run_id
        self.spec = fetch_spec(store, run_id)
        self.pending: list[Message] = []
        self._store = store
        self._clock = clock
        self._public_url = public_url
        self._log = RunLog(store, run_id, clock=clock)
        self._told = list_deliveries(store, run_id)
        self._num_read = 0
        self._newest_read: dict[str, int] = {}

    @property
    def is_over(self) -> bool:
        """Whether the run has ended and nothing that was read is pending."""
        return self._log.state.is_terminal and not self.pending

    def look(self) -> None:
        """Read what is new; what was read before a failure is kept.

        Raises:
            TransientError: the store is away.
            CorruptError: a record cannot be read.
        """
        self._log.refresh()
        for entry in self._log.entries[self._num_read :]:
            self._num_read += 1
            event = of_entry(self.spec, entry, public_url=self._public_url)
            if event is not None:
                self._take(event)
        if self._webhooks_for("published"):
            for average in requested_averages(self.spec, self._log.entries):
                self._look_at(average.name)

    def _look_at(self, name: str) -> None:
        generations = Generations(self._store, self.run_id, name)
        for number in generations.assessed_numbers(after=self._newest_read.get(name, 0)):
            event_id = average_event_id(name, number)
            if any((webhook, event_id) not in self._told for webhook, _ in self._webhooks_for("published")):
                record = generations.fetch_assessment(number)
                if record is not None:
                    self._take(of_assessment(self.spec, record, public_url=self._public_url))
            self._newest_read[name] = number

    def _take(self, event: Event) -> None:
        for webhook, url in self._webhooks_for(event.kind):
            if (webhook, event.event_id) not in self._told:
                self.pending.append(Message(self.run_id, webhook, url, event, due_at=self._clock.monotonic()))

    def _webhooks_for(self, kind: str) -> list[tuple[int, str]]:
        return [
            (number, webhook.url)
            for number, webhook in enumerate(self.spec.request.webhooks)
            if kind in webhook.events
        ]
