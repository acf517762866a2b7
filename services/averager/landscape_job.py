"""One landscape from its request to its result: weights fetched, a child process asked, what it finds recorded.

It runs in a thread of its own and knows records, files and one child; not which landscape comes next. The
invariant: it ends with a result, or leaves the attempt so that another one can begin; and the child, and the
folder with the weights, never outlive it.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import structlog
from pydantic import ValidationError

from services.averager.landscape_inputs import fetch_inputs
from services.averager.landscape_protocol import (
    MESSAGE_LIMIT,
    LandscapeFailed,
    LandscapeFound,
    PointDone,
    landscape_finding_adapter,
)
from services.runtime.child import Child
from wa_core.catalog.landscapes import Landscapes
from wa_core.errors import FencedError, StoreAuthError, TransientError, UserCodeError, WeightAveragingError
from wa_core.records import LandscapeProgress, LandscapeResult, MarkedPoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from services.averager.landscape_inputs import Inputs
    from services.averager.landscape_protocol import LandscapeFinding
    from wa_core.clock import Clock
    from wa_core.records import LandscapeAttempt, LandscapeRecord
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

#: What a landscape process is.
COMMAND = (sys.executable, "-m", "services.averager.landscape")

DIED = "landscape_died"
NO_ROOM = "landscape_no_room"
REPORT_EVERY_S = 2.0
_ASK_EVERY_S = 0.1
_STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one landscape may take. `max_samples` is of held-out and of calibration data, each."""

    time_s: float = 900.0
    memory_bytes: int | None = 4 << 30
    max_samples: int = 1024


class _Stopped(Exception):  # noqa: N818  no error: somebody wants the end
    """The work was given up."""


class LandscapeJob(threading.Thread):
    """Works one landscape out. `is_last` says that no attempt follows, so that a lost child is a failure.

    It takes the folder over, and removes it.
    """

    def __init__(
        self,
        store: ObjectStore,
        record: LandscapeRecord,
        attempt: LandscapeAttempt,
        *,
        clock: Clock,
        folder: Path,
        limits: Limits,
        command: Sequence[str],
        is_last: bool,
    ) -> None:
        super().__init__(name="landscape", daemon=True)
        self._store = store
        self._known = Landscapes(store, record.run_id, record.name)
        self._record = record
        self._attempt = attempt
        self._clock = clock
        self._folder = folder
        self._limits = limits
        self._command = command
        self._is_last = is_last
        self._is_stopping = threading.Event()
        self._began_at = clock.monotonic()
        self._reported_at = float("-inf")

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
                self._known.finish(result)
                log.info("landscape_done", landscape_id=result.landscape_id, state=result.state, code=result.code)
        except (FencedError, _Stopped):
            pass  # another attempt goes on, or will
        except (TransientError, StoreAuthError) as error:
            log.warning("landscape_left", landscape_id=self._record.landscape_id, error=error.message)
        except Exception:  # the thread's outermost loop; the next attempt may fare better
            log.exception("landscape_left", landscape_id=self._record.landscape_id)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _result(self) -> LandscapeResult | None:
        """What came of it; None where another attempt is to come."""
        try:
            self._report(0.0)
            inputs = fetch_inputs(
                self._store,
                self._record,
                self._folder,
                max_samples=self._limits.max_samples,
                clock=self._clock,
                on_read=lambda: self._keep_on(0.0),
            )
            return self._measured(inputs)
        except _Stopped:
            self._release()
            raise
        except UserCodeError as error:
            if self._is_last:
                return self._failed(DIED, error.message)
            log.warning("landscape_child_lost", landscape_id=self._record.landscape_id, error=error.message)
            self._release()
            return None
        except (FencedError, TransientError, StoreAuthError):
            raise
        except WeightAveragingError as error:
            return self._failed(error.code, error.message)
        except OSError as error:
            return self._failed(NO_ROOM, f"the weights could not be put on the averager's disk: {error.strerror}")

    def _measured(self, inputs: Inputs) -> LandscapeResult:
        child = Child(self._command, title="landscape process")
        try:
            child.ask(json.dumps(str(self._folder)).encode())
            return self._heard(child, inputs)
        except OSError as error:
            raise UserCodeError(f"the landscape process could not be asked ({error})") from error
        finally:
            child.end()

    def _heard(self, child: Child, inputs: Inputs) -> LandscapeResult:
        done = 0.0
        while True:
            for finding in map(_parsed, child.lines()):
                match finding:
                    case PointDone():
                        done = min(1.0, finding.done / finding.of)
                    case LandscapeFound():
                        return self._succeeded(finding, inputs)
                    case LandscapeFailed():
                        raise WeightAveragingError(finding.message, code=finding.code)
            self._check_limits(child)
            self._keep_on(done)
            self._is_stopping.wait(_ASK_EVERY_S)

    def _keep_on(self, done: float) -> None:
        """Give a sign of life when it is time, unless the work is not ours any more."""
        if self._is_stopping.is_set():
            raise _Stopped
        if self._clock.monotonic() - self._reported_at < REPORT_EVERY_S:
            return
        if self._known.newest_attempt(self._record.landscape_id) > self._attempt.attempt:
            raise FencedError(f"another averager works on landscape {self._record.landscape_id}")
        self._report(done)

    def _report(self, done: float) -> None:
        self._reported_at = self._clock.monotonic()
        self._write(self._attempt.who, done)

    def _release(self) -> None:
        self._write("", 0.0)

    def _write(self, who: str, done: float) -> None:
        beat = LandscapeProgress(attempt=self._attempt.attempt, who=who, at=self._clock.now(), progress=done)
        self._known.report(self._record.landscape_id, beat)

    def _check_limits(self, child: Child) -> None:
        held, limit = child.memory_bytes, self._limits.memory_bytes
        if limit is not None and held is not None and held > limit:
            raise WeightAveragingError(
                f"the landscape held {held >> 20} MiB, over the limit of {limit >> 20} MiB, and was ended; let "
                f"the recipe yield smaller batches, or raise WA_LANDSCAPE_MEMORY_MB",
                code="landscape_out_of_memory",
            )
        if self._clock.monotonic() - self._began_at > self._limits.time_s:
            raise WeightAveragingError(
                f"the landscape took longer than {self._limits.time_s:g} s and was ended; ask for fewer points, "
                f"or raise WA_LANDSCAPE_TIME_LIMIT_S",
                code="landscape_timeout",
            )

    def _succeeded(self, found: LandscapeFound, inputs: Inputs) -> LandscapeResult:
        return self._outcome(
            state="succeeded",
            generation=inputs.generation,
            markers=list(self._markers(found, inputs)),
            **found.model_dump(exclude={"kind", "places", "losses_there"}),
        )

    def _markers(self, found: LandscapeFound, inputs: Inputs) -> Iterator[MarkedPoint]:
        for (label, step), (x, y), loss in zip(inputs.labels, found.places, found.losses_there, strict=True):
            height = loss if self._record.kind == "line" and loss is not None else y
            yield MarkedPoint(label=label, x=x, y=height, step=step, loss=loss)

    def _failed(self, code: str, message: str) -> LandscapeResult:
        return self._outcome(state="failed", code=code, message=message[:MESSAGE_LIMIT])

    def _outcome(self, **fields: Any) -> LandscapeResult:  # noqa: ANN401  the record checks them
        took_s = self._clock.monotonic() - self._began_at
        return LandscapeResult(
            landscape_id=self._record.landscape_id, at=self._clock.now(), took_s=took_s, **fields
        )


def _parsed(line: bytes) -> LandscapeFinding:
    try:
        return landscape_finding_adapter.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise UserCodeError(f"the landscape process talked nonsense ({line[:80]!r}: {first})") from None
