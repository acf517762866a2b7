"""What is recorded of any job that an idle averager does: the request, who works on it, and what came of it.

The request and the result are written once; an attempt takes the work, and its progress is a sign of life
(ADR 26). What one kind of job has more is in a module of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from pydantic import AwareDatetime, Field

from wa_core.records.base import FORMAT, Name, Record, new_write_id


class JobPart(Record, ABC):
    """A record of one job."""

    @property
    @abstractmethod
    def job_id(self) -> str:
        """Which job's it is (a ULID)."""


class JobRecord(JobPart):
    """A job that somebody wants done for an average."""

    format: Literal[1] = FORMAT
    run_id: str
    name: Name
    write_id: str = Field(default_factory=new_write_id)
    created_at: AwareDatetime


class JobAttempt(JobPart):
    """Somebody has taken the work. Attempts are numbered from 1; only the newest goes on."""

    format: Literal[1] = FORMAT
    attempt: int = Field(ge=1)
    write_id: str = Field(default_factory=new_write_id)
    at: AwareDatetime
    who: str


class JobProgress(Record):
    """How far an attempt is: a sign of life, overwritten again and again, and never the truth."""

    attempt: int = Field(ge=1)
    who: str
    at: AwareDatetime
    progress: float = Field(default=0.0, ge=0, le=1)


class JobResult(JobPart):
    """What came of a job. With ``failed``, `code` and `message` say why."""

    format: Literal[1] = FORMAT
    write_id: str = Field(default_factory=new_write_id)
    at: AwareDatetime
    state: Literal["succeeded", "failed"]
    code: str | None = None
    message: str = Field(default="", max_length=4000)
    took_s: float = Field(default=0.0, ge=0)
