"""One landscape: weights fetched, a child process asked, what it finds recorded.

It knows the weights that a landscape goes through, and the limits on it; not how it comes to be done, which
`services.averager.idle_job` knows.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import ValidationError

from services.averager.idle_job import IdleJob
from services.averager.landscape_inputs import fetch_inputs
from services.averager.landscape_protocol import (
    LandscapeFailed,
    LandscapeFound,
    PointDone,
    landscape_finding_adapter,
)
from services.runtime.child import Child
from wa_core.errors import UserCodeError, WeightAveragingError
from wa_core.records import LandscapeRecord, MarkedPoint

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from services.averager.idle_job import Taken
    from services.averager.landscape_inputs import Inputs
    from services.averager.landscape_protocol import LandscapeFinding
    from wa_core.clock import Clock
    from wa_core.records import JobResult
    from wa_core.store.base import ObjectStore

#: What a landscape process is.
COMMAND = (sys.executable, "-m", "services.averager.landscape")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one landscape may take. `max_samples` is of held-out and of calibration data, each."""

    time_s: float = 900.0
    memory_bytes: int | None = 4 << 30
    max_samples: int = 1024


class LandscapeJob(IdleJob):
    """Works one landscape out."""

    def __init__(
        self, store: ObjectStore, taken: Taken, *, clock: Clock, limits: Limits, command: Sequence[str]
    ) -> None:
        super().__init__(taken, clock=clock)
        self._store = store
        self._limits = limits
        self._command = command
        assert isinstance(taken.record, LandscapeRecord)  # noqa: S101  the landscaper takes no others
        self._record = taken.record

    def work(self) -> JobResult:
        """Fetch the weights, have the child go through them, and record what it finds."""
        inputs = fetch_inputs(
            self._store,
            self._record,
            self.folder,
            max_samples=self._limits.max_samples,
            clock=self._clock,
            on_read=self.keep_on,
        )
        child = Child(self._command, title="landscape process")
        try:
            child.ask(json.dumps(str(self.folder)).encode())
            return self._heard(child, inputs)
        except OSError as error:
            raise UserCodeError(f"the landscape process could not be asked ({error})") from error
        finally:
            child.end()

    def _heard(self, child: Child, inputs: Inputs) -> JobResult:
        for finding in map(_parsed, self.said_by(child)):
            match finding:
                case PointDone():
                    self.done = min(1.0, finding.done / finding.of)
                case LandscapeFound():
                    return self._succeeded(finding, inputs)
                case LandscapeFailed():
                    raise WeightAveragingError(finding.message, code=finding.code)
        raise AssertionError("unreachable: a child that says nothing more raises")

    def check(self, child: Child) -> None:
        """Raise when it takes more memory, or time, than it may."""
        held, limit = child.memory_bytes, self._limits.memory_bytes
        if limit is not None and held is not None and held > limit:
            raise WeightAveragingError(
                f"the landscape held {held >> 20} MiB, over the limit of {limit >> 20} MiB, and was ended; let "
                f"the recipe yield smaller batches, or raise WA_LANDSCAPE_MEMORY_MB",
                code="landscape_out_of_memory",
            )
        if self.took_s > self._limits.time_s:
            raise WeightAveragingError(
                f"the landscape took longer than {self._limits.time_s:g} s and was ended; ask for fewer points, "
                f"or raise WA_LANDSCAPE_TIME_LIMIT_S",
                code="landscape_timeout",
            )

    def _succeeded(self, found: LandscapeFound, inputs: Inputs) -> JobResult:
        return self.outcome(
            state="succeeded",
            generation=inputs.generation,
            markers=list(self._markers(found, inputs)),
            **found.model_dump(exclude={"kind", "places", "losses_there"}),
        )

    def _markers(self, found: LandscapeFound, inputs: Inputs) -> Iterator[MarkedPoint]:
        for (label, step), (x, y), loss in zip(inputs.labels, found.places, found.losses_there, strict=True):
            height = loss if self._record.kind == "line" and loss is not None else y
            yield MarkedPoint(label=label, x=x, y=height, step=step, loss=loss)


def _parsed(line: bytes) -> LandscapeFinding:
    try:
        return landscape_finding_adapter.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise UserCodeError(f"the landscape process talked nonsense ({line[:80]!r}: {first})") from None
