"""One verification: the process of `wa verify` started for a generation, and what it finds recorded.

It knows what that process says; not how it verifies (`services.averager.verify`). The process reads the bucket,
so it has the averager's credentials; it runs no user code.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from services.averager.idle_job import IdleJob
from services.averager.protocol import MESSAGE_LIMIT
from services.runtime.child import Child
from wa_core.errors import (
    StoreAuthError,
    StoreUnavailableError,
    TransientError,
    UserCodeError,
    WeightAveragingError,
)
from wa_core.records import VerificationRecord

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from services.averager.idle_job import Taken
    from wa_core.clock import Clock
    from wa_core.records import JobResult

#: What a process that verifies is.
COMMAND = (sys.executable, "-m", "services.averager.verifying")

#: Codes that say that something is not what it should be; with any other there is no finding.
DIFFERENCES = frozenset({"wrong_coefficients", "checkpoint_changed", "state_differs", "weights_differ"})
#: Codes of a store that is away, or refuses us, which may pass.
_PASSING = frozenset({TransientError.kind, StoreUnavailableError.kind, StoreAuthError.kind})


class VerificationJob(IdleJob):
    """Verifies one generation of an average."""

    def __init__(
        self, taken: Taken, *, clock: Clock, environment: Mapping[str, str], command: Sequence[str]
    ) -> None:
        super().__init__(taken, clock=clock)
        assert isinstance(taken.record, VerificationRecord)  # noqa: S101  the verifier takes no others
        asked = (taken.record.run_id, taken.record.name, str(taken.record.generation))
        self._command = (*command, *asked)
        self._environment = {**environment, "WA_SCRATCH_DIR": str(self.folder)}

    def work(self) -> JobResult:
        """Have it recomputed, and record what was found."""
        child = Child(self._command, title="verifying process", environment=self._environment)
        try:
            for line in self.said_by(child):
                said = _parsed(line)
                if "verified" in said:
                    return self._equal(said["verified"])
                if "error" in said:
                    return self._not_equal(**said["error"])
                self.done = said["done"] / said["all"]
        finally:
            child.end()
        raise AssertionError("unreachable: a child that says nothing more raises")

    def _equal(self, found: dict[str, Any]) -> JobResult:
        return self.outcome(
            state="succeeded",
            is_equal=True,
            is_state_equal=found["is_state_equal"],
            is_served_equal=None if found["served_generation"] is None else True,
            num_checkpoints=len(found["steps"]),
            num_recalibrated=len(found["recalibrated"]),
        )

    def _not_equal(self, *, code: str, message: str) -> JobResult:
        if code in DIFFERENCES:
            return self.outcome(state="succeeded", is_equal=False, code=code, message=message[:MESSAGE_LIMIT])
        if code in _PASSING:
            raise TransientError(message)
        raise WeightAveragingError(message, code=code)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        said: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise UserCodeError(f"the verifying process talked nonsense ({line[:80]!r}: {error})") from None
    return said
