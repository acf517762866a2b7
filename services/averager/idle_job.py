"""One job from its request to its result: a thread asks a child process, shows how far it is, records the end.

It knows records and one child; not what kind of job it is, nor which comes next. The invariant: it ends with a
result, or leaves the attempt so that another one can begin; and the child, and the job's folder, never outlive it.
"""

from __future__ import annotations

import shutil
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog

from services.averager.protocol import MESSAGE_LIMIT
from wa_core.errors import FencedError, StoreAuthError, TransientError, UserCodeError, WeightAveragingError
from wa_core.records import JobProgress

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from services.runtime.child import Child
    from wa_core.catalog.jobs import Jobs
    from wa_core.clock import Clock
    from wa_core.records import JobAttempt, JobRecord, JobResult

log = structlog.get_logger(__name__)

REPORT_EVERY_S = 2.0
_ASK_EVERY_S = 0.1
_STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Taken:
    """A job that is ours to do. `is_last` says that no attempt follows, so that a lost child is a failure."""

    known: Jobs[Any, Any, Any]
    record: JobRecord
    attempt: JobAttempt
    folder: Path
    is_last: bool


class _Stopped(Exception):  # noqa: N818  no error: somebody wants the end
    """The work was given up."""


class IdleJob(threading.Thread, ABC):
    """Does one job. It takes the folder over, and removes it.

    Attributes:
        folder: working space.
        done: how much is done, from 0 to 1; for the work to set, and shown.
    """

    def __init__(self, taken: Taken, *, clock: Clock) -> None:
        super().__init__(name=taken.known.noun, daemon=True)
        self.folder = taken.folder
        self.done = 0.0
        self._taken = taken
        self._clock = clock
        self._is_stopping = threading.Event()
        self._began_at = clock.monotonic()
        self._reported_at = float("-inf")

    @abstractmethod
    def work(self) -> JobResult:
        """Do it, calling `keep_on` now and then.

        Raises:
            UserCodeError: the child was lost; another attempt may fare better.
            TransientError: the store is away; the same.
            WeightAveragingError: it cannot be done.
            OSError: the disk has no room.
        """

    def stop(self) -> None:
        """Give it up, and wait until that is done, though not for a store that hangs."""
        self._is_stopping.set()
        if self.is_alive():
            self.join(_STOP_S)

    def run(self) -> None:
        """The thread's work."""
        try:
            result = self._result()
            if result is not None:
                self._taken.known.finish(result)
                log.info("job_done", **self._names, state=result.state, code=result.code)
        except (FencedError, _Stopped):
            pass  # another attempt goes on, or will
        except (TransientError, StoreAuthError) as error:
            log.warning("job_left", **self._names, error=error.message)
        except Exception:  # the thread's outermost loop; the next attempt may fare better
            log.exception("job_left", **self._names)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def keep_on(self) -> None:
        """Give a sign of life when it is time, unless the work is not ours any more."""
        if self._is_stopping.is_set():
            raise _Stopped
        if self._clock.monotonic() - self._reported_at < REPORT_EVERY_S:
            return
        job_id = self._taken.record.job_id
        if self._taken.known.newest_attempt(job_id) > self._taken.attempt.attempt:
            raise FencedError(f"another averager works on {self._taken.known.noun} {job_id}")
        self._report()

    def said_by(self, child: Child) -> Iterator[bytes]:
        """What a child says, line by line; in between the limits are looked at, and a sign of life is given.

        Raises:
            UserCodeError: it is dead, and has said nothing more.
        """
        while True:
            yield from child.lines()
            self.check(child)
            self.keep_on()
            self._is_stopping.wait(_ASK_EVERY_S)

    def check(self, child: Child) -> None:
        """Raise when a child takes more than it may."""

    def outcome(self, **fields: object) -> JobResult:
        """A result with these fields."""
        result: JobResult = self._taken.known.outcome(
            self._taken.record.job_id, at=self._clock.now(), took_s=self.took_s, **fields
        )
        return result

    @property
    def took_s(self) -> float:
        """How long it has been at it, in seconds."""
        return self._clock.monotonic() - self._began_at

    @property
    def _names(self) -> dict[str, str]:
        return {"kind": self._taken.known.kind, "job_id": self._taken.record.job_id}

    def _result(self) -> JobResult | None:
        """What came of it; None where another attempt is to come."""
        noun = self._taken.known.noun
        try:
            self._report()
            return self.work()
        except _Stopped:
            self._release()
            raise
        except UserCodeError as error:
            if self._taken.is_last:
                return self._failed(f"{noun}_died", error.message)
            log.warning("job_child_lost", **self._names, error=error.message)
            self._release()
            return None
        except (FencedError, TransientError, StoreAuthError):
            raise
        except WeightAveragingError as error:
            return self._failed(error.code, error.message)
        except OSError as error:
            return self._failed(f"{noun}_no_room", f"the averager's disk could not be written: {error.strerror}")

    def _failed(self, code: str, message: str) -> JobResult:
        return self.outcome(state="failed", code=code, message=message[:MESSAGE_LIMIT])

    def _report(self) -> None:
        self._reported_at = self._clock.monotonic()
        self._write(self._taken.attempt.who, self.done)

    def _release(self) -> None:
        self._write("", 0.0)

    def _write(self, who: str, done: float) -> None:
        beat = JobProgress(attempt=self._taken.attempt.attempt, who=who, at=self._clock.now(), progress=done)
        self._taken.known.report(self._taken.record.job_id, beat)
