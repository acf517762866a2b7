"""Jobs for averages: wanted by one process, done by an idle averager, which meet in these records (ADR 26).

A request is created once, and so is its result; numbered attempts say who has the work, and the newest of them is
the one that goes on. A marker tells averagers where to look, and is put before the request that it points to.
What a job is about is not known here. The invariant: there is at most one result, whoever works on it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, Literal, TypeVar

from pydantic import ValidationError

from wa_core import layout
from wa_core.catalog.commit import commit, parse
from wa_core.errors import ConflictError, NotFoundError, ObjectNotFoundError
from wa_core.records import JobAttempt, JobProgress, JobRecord, JobResult, Marker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

T = TypeVar("T")
RecordT = TypeVar("RecordT", bound=JobRecord)
AttemptT = TypeVar("AttemptT", bound=JobAttempt)
ResultT = TypeVar("ResultT", bound=JobResult)

#: Of one average and kind; each may take minutes of somebody's processor.
MAX_UNFINISHED = 4
MAX_JOBS = 200


@dataclass(frozen=True, slots=True)
class Job(Generic[RecordT, ResultT]):
    """One job as the bucket has it: wanted, perhaps being worked on, perhaps done."""

    record: RecordT
    progress: JobProgress | None
    result: ResultT | None

    @property
    def state(self) -> Literal["queued", "running", "succeeded", "failed"]:
        """``queued``, ``running``, or how it ended."""
        if self.result is not None:
            return self.result.state
        return "running" if self.progress else "queued"

    @property
    def done(self) -> float:
        """How much of it is done, from 0 to 1."""
        if self.result is not None:
            return 1.0 if self.result.state == "succeeded" else 0.0
        return self.progress.progress if self.progress else 0.0


class Jobs(Generic[RecordT, AttemptT, ResultT]):
    """The jobs of one kind for one average. Reads go to the store; nothing is cached."""

    kind: ClassVar[layout.JobKind]
    noun: ClassVar[str]  # as codes and messages have it
    record_type: type[RecordT]
    attempt_type: type[AttemptT]
    result_type: type[ResultT]

    def __init__(self, store: ObjectStore, run_id: str, name: str) -> None:
        self.run_id = run_id
        self.name = name
        self._store = store

    def ids(self) -> dict[str, bool]:
        """The ids of all, the oldest first -> whether there is a result."""
        listed = self._store.list(layout.jobs_prefix(self.kind, self.run_id, self.name))
        found = [known for info in listed if (known := layout.job_id_of(self.kind, info.key))]
        done = {job_id for job_id, is_result in found if is_result}
        return {job_id: job_id in done for job_id, is_result in found if not is_result}

    def fetch(self, job_id: str) -> Job[RecordT, ResultT]:
        """Read one.

        Raises:
            NotFoundError: there is no such job.
            CorruptError: a record of it cannot be read.
        """
        record = self._find(layout.job(*self._place(job_id)), self.record_type.model_validate_json)
        if record is None:
            raise self._not_found(job_id)
        result = self.result(job_id)
        return Job(record, None if result else self.progress(job_id), result)

    def result(self, job_id: str) -> ResultT | None:
        """What came of one, once there is something.

        Raises:
            CorruptError: it cannot be read.
        """
        return self._find(layout.job_result(*self._place(job_id)), self.result_type.model_validate_json)

    def progress(self, job_id: str) -> JobProgress | None:
        """The newest sign of life of whoever works on one; advice."""
        try:
            return JobProgress.model_validate_json(self._store.get(layout.job_progress(*self._place(job_id))))
        except (ObjectNotFoundError, ValidationError):
            return None

    def newest_attempt(self, job_id: str) -> int:
        """The number of the newest attempt, 0 before the first."""
        listed = self._store.list(layout.job_attempts_prefix(*self._place(job_id)))
        return max((number for info in listed if (number := layout.number_of(info.key))), default=0)

    def begin(self, job_id: str, *, attempt: int, who: str, at: datetime) -> AttemptT:
        """Begin an attempt.

        Raises:
            ConflictError: somebody else has begun it.
        """
        record = self.attempt_type.model_validate({self._id: job_id, "attempt": attempt, "at": at, "who": who})
        commit(self._store, layout.job_attempt(*self._place(job_id), attempt), record)
        return record

    def report(self, job_id: str, progress: JobProgress) -> None:
        """Give a sign of life."""
        self._store.put(layout.job_progress(*self._place(job_id)), progress.model_dump_json().encode())

    def outcome(self, job_id: str, **fields: object) -> ResultT:
        """A result, to be finished with; `fields` are its others."""
        return self.result_type.model_validate({self._id: job_id, **fields})

    def finish(self, result: ResultT) -> None:
        """Commit what came of one, if nobody has, and take the marker away."""
        with suppress(ConflictError):  # another attempt was quicker; there is one result
            commit(self._store, layout.job_result(*self._place(result.job_id)), result)
        self.unmark(result.job_id)

    def unmark(self, job_id: str) -> None:
        """Nobody need look at it any more."""
        self._store.delete(layout.job_marker(*self._place(job_id)))

    def _ask(self, *, clock: Clock, **fields: object) -> RecordT:
        """Ask for a job; `fields` are what its kind has more.

        Raises:
            ConflictError: the average has too many (`too_many_landscapes` or `too_many_verifications`).
        """
        self._check_room()
        now = clock.now()
        job_id = layout.new_run_id(now)
        record = self.record_type.model_validate(
            {self._id: job_id, "run_id": self.run_id, "name": self.name, "created_at": now, **fields}
        )
        # The marker first: a crash in between leaves one without a request, and never a request that nobody finds.
        marker = Marker(run_id=self.run_id, at=now).model_dump_json().encode()
        self._store.put(layout.job_marker(*self._place(job_id)), marker)
        commit(self._store, layout.job(*self._place(job_id)), record)
        return record

    def _check_room(self) -> None:
        done = self.ids()
        num_open = sum(not is_done for is_done in done.values())
        if num_open >= MAX_UNFINISHED or len(done) >= MAX_JOBS:
            raise ConflictError(
                f"average {self.name!r} of run {self.run_id} has {num_open} {self.kind} that are not done, of "
                f"{len(done)} in all; at most {MAX_UNFINISHED} of {MAX_JOBS} are taken: look at those first",
                code=f"too_many_{self.kind}",
            )

    def _find(self, key: str, parser: Callable[[bytes], T]) -> T | None:
        try:
            return parse(parser, self._store.get(key), key=key)
        except ObjectNotFoundError:
            return None

    def _place(self, job_id: str) -> tuple[layout.JobKind, str, str, str]:
        if not layout.is_run_id(job_id):
            raise self._not_found(job_id)
        return self.kind, self.run_id, self.name, job_id

    def _not_found(self, job_id: str) -> NotFoundError:
        return NotFoundError(
            f"average {self.name!r} of run {self.run_id} has no {self.noun} {job_id[:100]!r}",
            code=f"{self.noun}_not_found",
        )

    @property
    def _id(self) -> str:
        return f"{self.noun}_id"


def list_wanted(store: ObjectStore, kind: layout.JobKind) -> Iterator[tuple[str, str, str]]:
    """(run id, average, job id) of the jobs of one kind without a result, the oldest request first."""
    listed = store.list(layout.job_markers(kind))
    return (found for info in listed if (found := layout.job_of_marker(kind, info.key)))
