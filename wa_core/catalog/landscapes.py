"""Landscapes of averages: wanted by one process, worked out by another, which meet in these records (ADR 26).

A request is created once, and so is its result; numbered attempts say who has the work, and the newest of them is
the one that goes on. A marker tells averagers where to look, and is put before the request that it points to. The
invariant: there is at most one result, whoever works on it, however often.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from wa_core import layout
from wa_core.catalog.commit import commit, parse
from wa_core.errors import ConflictError, NotFoundError, ObjectNotFoundError
from wa_core.records import (
    LandscapeAttempt,
    LandscapeProgress,
    LandscapeRecord,
    LandscapeResult,
    Marker,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from wa_core.clock import Clock
    from wa_core.records import LandscapeRequest
    from wa_core.store.base import ObjectStore

T = TypeVar("T")

#: Of one average; each may take minutes of somebody's processor.
MAX_UNFINISHED = 4
MAX_LANDSCAPES = 200


@dataclass(frozen=True, slots=True)
class Landscape:
    """One landscape as the bucket has it: wanted, perhaps being worked on, perhaps done."""

    record: LandscapeRecord
    progress: LandscapeProgress | None
    result: LandscapeResult | None


class Landscapes:
    """The landscapes of one average. Reads go to the store; nothing is cached."""

    def __init__(self, store: ObjectStore, run_id: str, name: str) -> None:
        self.run_id = run_id
        self.name = name
        self._store = store

    def ask(self, wanted: LandscapeRequest, *, clock: Clock) -> LandscapeRecord:
        """Ask for a landscape.

        Raises:
            ConflictError: the average has too many (`too_many_landscapes`).
        """
        done = self.ids()
        num_open = sum(not is_done for is_done in done.values())
        if num_open >= MAX_UNFINISHED or len(done) >= MAX_LANDSCAPES:
            raise ConflictError(
                f"average {self.name!r} of run {self.run_id} has {num_open} landscapes that are not done, of "
                f"{len(done)} in all; at most {MAX_UNFINISHED} of {MAX_LANDSCAPES} are taken: look at those first",
                code="too_many_landscapes",
            )
        now = clock.now()
        record = LandscapeRecord(
            run_id=self.run_id,
            name=self.name,
            landscape_id=layout.new_run_id(now),
            created_at=now,
            kind=wanted.kind,
            points=wanted.num_points,
        )
        # The marker first: a crash in between leaves one without a request, and never a request that nobody finds.
        marker = Marker(run_id=self.run_id, at=now).model_dump_json().encode()
        self._store.put(layout.landscape_marker(self.run_id, self.name, record.landscape_id), marker)
        commit(self._store, layout.landscape(self.run_id, self.name, record.landscape_id), record)
        return record

    def ids(self) -> dict[str, bool]:
        """The ids of all, the oldest first -> whether there is a result."""
        listed = self._store.list(layout.landscapes_prefix(self.run_id, self.name))
        found = [known for info in listed if (known := layout.landscape_id_of(info.key))]
        done = {landscape_id for landscape_id, is_result in found if is_result}
        return {landscape_id: landscape_id in done for landscape_id, is_result in found if not is_result}

    def fetch(self, landscape_id: str) -> Landscape:
        """Read one.

        Raises:
            NotFoundError: there is no such landscape.
            CorruptError: a record of it cannot be read.
        """
        record = self._find(layout.landscape(*self._names(landscape_id)), LandscapeRecord.model_validate_json)
        if record is None:
            raise NotFoundError(
                f"average {self.name!r} of run {self.run_id} has no landscape {landscape_id[:100]!r}",
                code="landscape_not_found",
            )
        result = self.result(landscape_id)
        return Landscape(record, None if result else self.progress(landscape_id), result)

    def result(self, landscape_id: str) -> LandscapeResult | None:
        """What came of one, once there is something.

        Raises:
            CorruptError: it cannot be read.
        """
        return self._find(layout.landscape_result(*self._names(landscape_id)), LandscapeResult.model_validate_json)

    def progress(self, landscape_id: str) -> LandscapeProgress | None:
        """The newest sign of life of whoever works on one; advice."""
        try:
            body = self._store.get(layout.landscape_progress(*self._names(landscape_id)))
            return LandscapeProgress.model_validate_json(body)
        except (ObjectNotFoundError, ValidationError):
            return None

    def newest_attempt(self, landscape_id: str) -> int:
        """The number of the newest attempt, 0 before the first."""
        listed = self._store.list(layout.landscape_attempts_prefix(*self._names(landscape_id)))
        return max((number for info in listed if (number := layout.number_of(info.key))), default=0)

    def take(self, attempt: LandscapeAttempt) -> None:
        """Begin an attempt.

        Raises:
            ConflictError: somebody else has begun it.
        """
        commit(
            self._store,
            layout.landscape_attempt(*self._names(attempt.landscape_id), attempt.attempt),
            attempt,
        )

    def report(self, landscape_id: str, progress: LandscapeProgress) -> None:
        """Give a sign of life."""
        key = layout.landscape_progress(*self._names(landscape_id))
        self._store.put(key, progress.model_dump_json().encode())

    def finish(self, result: LandscapeResult) -> None:
        """Commit what came of one, if nobody has, and take the marker away."""
        with suppress(ConflictError):  # another attempt was quicker; there is one result
            commit(self._store, layout.landscape_result(*self._names(result.landscape_id)), result)
        self.unmark(result.landscape_id)

    def unmark(self, landscape_id: str) -> None:
        """Nobody need look at it any more."""
        self._store.delete(layout.landscape_marker(*self._names(landscape_id)))

    def _find(self, key: str, parser: Callable[[bytes], T]) -> T | None:
        try:
            return parse(parser, self._store.get(key), key=key)
        except ObjectNotFoundError:
            return None

    def _names(self, landscape_id: str) -> tuple[str, str, str]:
        if not layout.is_run_id(landscape_id):
            raise NotFoundError(f"there is no landscape {landscape_id[:100]!r}", code="landscape_not_found")
        return self.run_id, self.name, landscape_id


def list_wanted(store: ObjectStore) -> Iterator[tuple[str, str, str]]:
    """(run id, average, landscape id) of the landscapes without a result, the oldest request first."""
    return (found for info in store.list(layout.LANDSCAPES) if (found := layout.landscape_of_marker(info.key)))
