"""Small jobs beside the training loop: each is called every so often, in one thread.

The thread knows nothing of what the jobs do. A job that fails because the store is away is called again at its
next turn; training never waits for any of them.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import structlog

from wa_core.errors import WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

log = structlog.get_logger(__name__)

POLL_S = 0.1


@dataclass(slots=True)
class Job:
    """Something to call every `interval_s` seconds, and once more at the end when `is_last_wanted`."""

    call: Callable[[], None]
    interval_s: float
    is_last_wanted: bool = True
    due_at: float = field(default=0.0)


class Background:
    """A context manager that runs jobs in a daemon thread until it is left."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="trainer-background", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        for job in self._jobs:
            if job.is_last_wanted:
                _call(job)

    def _work(self) -> None:
        while not self._end.wait(POLL_S):
            for job in self._jobs:
                if time.monotonic() >= job.due_at:
                    _call(job)
                    job.due_at = time.monotonic() + job.interval_s


def _call(job: Job) -> None:
    try:
        job.call()
    except WeightAveragingError as error:
        log.warning("background_job_failed", job=job.call.__qualname__, error=error.message)
