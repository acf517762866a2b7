"""The verifications of an average, as jobs (ADR 44)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wa_core.catalog.jobs import Jobs
from wa_core.records import VerificationAttempt, VerificationRecord, VerificationResult

if TYPE_CHECKING:
    from wa_core.clock import Clock


class Verifications(Jobs[VerificationRecord, VerificationAttempt, VerificationResult]):
    """The verifications of one average."""

    kind = "verifications"
    noun = "verification"
    record_type = VerificationRecord
    attempt_type = VerificationAttempt
    result_type = VerificationResult

    def ask(self, generation: int, *, clock: Clock) -> VerificationRecord:
        """Ask whether a generation is what it says it is.

        Raises:
            ConflictError: the average has too many (`too_many_verifications`).
        """
        return self._ask(clock=clock, generation=generation)
