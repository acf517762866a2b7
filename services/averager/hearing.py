"""What an assess process has said of its job so far.

It knows findings and the job's averages; no process and no files. The invariant: there is a finding for every
average, said or not, and what is none is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from services.averager.protocol import (
    MESSAGE_LIMIT,
    AverageFound,
    JobDone,
    JobFailed,
    RawFound,
    finding_adapter,
)
from wa_core.errors import UserCodeError
from wa_core.records import BatchNormSummary

if TYPE_CHECKING:
    from services.averager.assess_job import AssessJob
    from services.averager.protocol import Finding

Where = Literal["process", "ray"]


class Hearing:
    """What the child has said of a job so far."""

    def __init__(self, job: AssessJob, *, started_at: float, where: Where = "process") -> None:
        self.job = job
        self.started_at = started_at
        self.where: Where = where
        self.is_over = False
        self.has_failed = False
        self.raw: RawFound | None = None
        self._found: dict[str, AverageFound] = {}
        self.failure = BatchNormSummary(status="failed", code="assess_failed", message="it was not assessed")

    def take(self, lines: list[bytes]) -> None:
        """Take in whole lines.

        Raises:
            UserCodeError: one of them is no finding.
        """
        for line in lines:
            try:
                self._take(finding_adapter.validate_json(line))
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]["msg"]
                raise UserCodeError(
                    f"the assess process talked nonsense ({line[:80]!r}: {first}); let the recipe print with "
                    f"print(), and leave other files alone"
                ) from None

    def fail(self, code: str, message: str) -> None:
        """There will be no more; averages without a finding get this one."""
        self.is_over = self.has_failed = True
        self.failure = BatchNormSummary(status="failed", code=code, message=message[:MESSAGE_LIMIT])

    def of(self, name: str) -> AverageFound:
        """What was found out about an average."""
        return self._found.get(name) or AverageFound(name=name, batchnorm=self.failure)

    def _take(self, finding: Finding) -> None:
        match finding:
            case RawFound():
                self.raw = finding
            case AverageFound(name=name) if name in self.job.averages:
                self._found[name] = finding
            case AverageFound(name=name):
                raise UserCodeError(f"the assess process spoke of {name!r}, which is no average of this job")
            case JobFailed():
                self.fail("assess_failed", finding.message)
            case JobDone():
                self.is_over = True
