"""What is recorded of a verification: which generation is meant, and whether it is what it says (ADR 44)."""

from __future__ import annotations

from pydantic import Field

from wa_core.records.jobs import JobAttempt, JobPart, JobRecord, JobResult


class _OfVerification(JobPart):
    verification_id: str

    @property
    def job_id(self) -> str:
        """The verification's id."""
        return self.verification_id


class VerificationRecord(_OfVerification, JobRecord):
    """A generation of an average that somebody wants verified."""

    generation: int = Field(ge=1)


class VerificationAttempt(_OfVerification, JobAttempt):
    """Somebody has taken a verification."""


class VerificationResult(_OfVerification, JobResult):
    """What came of a verification.

    With ``succeeded`` there is a finding: `is_equal`, or `code` and `message` say what differs. With ``failed``
    there is none, and they say why. `num_checkpoints` were read; `is_state_equal` is None where no accumulators
    are stored, `is_served_equal` where nothing is served; `num_recalibrated` buffers are recalibration's own.
    """

    is_equal: bool | None = None
    is_state_equal: bool | None = None
    is_served_equal: bool | None = None
    num_checkpoints: int = Field(default=0, ge=0)
    num_recalibrated: int = Field(default=0, ge=0)
