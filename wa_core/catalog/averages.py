"""Generations: the numbered, create-once manifests of one average, and the assessments beside them.

Two workers that build on the same generation both try to create the next number; one wins, and the other is
fenced: it drops what it holds and reads again. An assessment has the number of its generation and comes later, or
never; there is at most one of each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.catalog.commit import commit, parse
from wa_core.catalog.hints import MIN_LENGTH, read_number_hint, write_number_hint
from wa_core.errors import AverageNotFoundError, ConflictError, FencedError, ObjectNotFoundError
from wa_core.records import HEADLINE_METRIC, AssessmentRecord, AverageManifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.records import Assessment
    from wa_core.store.base import ObjectStore


class Generations:
    """The generations of one average. Reads go to the store; nothing is cached."""

    def __init__(self, store: ObjectStore, run_id: str, name: str) -> None:
        self.run_id = run_id
        self.name = name
        self._store = store
        self._hinted: dict[str, int] = {}

    def numbers(self, *, after: int = 0) -> list[int]:
        """The generations that exist, ascending, from the one after `after` on."""
        start = layout.generation(self.run_id, self.name, after)
        return self._numbers(layout.generations_prefix(self.run_id, self.name), start)

    def fetch(self, number: int) -> AverageManifest:
        """Read one generation.

        Raises:
            AverageNotFoundError: it does not exist (`generation_not_found`).
            CorruptError: it cannot be read.
        """
        key = layout.generation(self.run_id, self.name, number)
        try:
            body = self._store.get(key)
        except ObjectNotFoundError:
            raise AverageNotFoundError(
                f"average {self.name!r} of run {self.run_id} has no generation {number}",
                code="generation_not_found",
            ) from None
        return parse(AverageManifest.model_validate_json, body, key=key)

    def newest_number(self) -> int:
        """The number of the newest generation, 0 before the first."""
        return max(self._late_numbers(), default=0)

    def newest(self) -> AverageManifest | None:
        """The newest generation, or None before the first."""
        return next(self.newest_first(), None)

    def newest_first(self) -> Iterator[AverageManifest]:
        """All generations, the newest first; old ones are only listed when it comes to them."""
        late = self._late_numbers()
        yield from (self.fetch(number) for number in reversed(late))
        if late and late[0] > 1:
            yield from (self.fetch(number) for number in reversed(self.numbers()) if number < late[0])

    def commit(self, manifest: AverageManifest) -> None:
        """Publish a generation.

        Raises:
            FencedError: another worker has published this generation first.
            TransientError: the store is away; committing the same manifest again is safe.
        """
        self._commit(layout.generation(self.run_id, self.name, manifest.generation), manifest, did="published")
        self._hint(layout.generation_hint(self.run_id, self.name), manifest.generation)

    def assessed_numbers(self, *, after: int = 0) -> list[int]:
        """The generations that have been assessed, ascending, from the one after `after` on."""
        start = layout.assessment(self.run_id, self.name, after)
        return self._numbers(layout.assessments_prefix(self.run_id, self.name), start)

    def fetch_assessment(self, number: int) -> AssessmentRecord | None:
        """Read the assessment of generation `number`; None while there is none.

        Raises:
            CorruptError: it cannot be read.
        """
        key = layout.assessment(self.run_id, self.name, number)
        try:
            body = self._store.get(key)
        except ObjectNotFoundError:
            return None
        return parse(AssessmentRecord.model_validate_json, body, key=key)

    def newest_assessment(self) -> AssessmentRecord | None:
        """The assessment of the newest generation that has one, or None."""
        number = self.newest_assessed_number()
        return self.fetch_assessment(number) if number else None

    def newest_assessed_number(self) -> int:
        """The number of the newest generation that has been assessed, 0 before the first."""
        hint = read_number_hint(self._store, layout.assessment_hint(self.run_id, self.name))
        found = self.assessed_numbers(after=hint - 1) if hint else []
        return found[-1] if found[:1] == [hint] else max(self.assessed_numbers(), default=0)

    def commit_assessment(self, record: AssessmentRecord) -> None:
        """Make an assessment, and the files it names, what is served of its generation.

        Raises:
            FencedError: another worker has assessed this generation first.
            TransientError: the store is away; committing the same record again is safe.
        """
        self._commit(layout.assessment(self.run_id, self.name, record.generation), record, did="assessed")
        self._hint(layout.assessment_hint(self.run_id, self.name), record.generation)

    def best_with(self, generation: int, assessment: Assessment) -> int | None:
        """The best generation once `generation` has this assessment; what its record's `best` must be.

        Of equals the newer one. None when nothing was measured so far.
        """
        newest, loss = self.newest_assessment(), headline(assessment)
        if newest is None or newest.best is None:
            return None if loss is None else generation
        best = newest if newest.best == newest.generation else self.fetch_assessment(newest.best)
        kept = headline(best.assessment) if best else None
        is_better = loss is not None and (kept is None or (loss, -generation) < (kept, -newest.best))
        return generation if is_better else newest.best

    def _late_numbers(self) -> list[int]:
        """The newest generations, ascending, and perhaps all of them: from a hint on that proves to be right."""
        hint = read_number_hint(self._store, layout.generation_hint(self.run_id, self.name))
        found = self.numbers(after=hint - 1) if hint else []
        return found if found[:1] == [hint] else self.numbers()

    def _hint(self, key: str, number: int) -> None:
        """Renew a hint now and then, once there is so much that it saves something."""
        if number >= MIN_LENGTH and number - self._hinted.get(key, 0) >= MIN_LENGTH:
            write_number_hint(self._store, key, number)
            self._hinted[key] = number

    def _numbers(self, prefix: str, start_after: str) -> list[int]:
        listed = self._store.list(prefix, start_after=start_after, delimiter="/")
        found = (layout.number_of(info.key) for info in listed)
        return [number for number in found if number is not None]

    def _commit(self, key: str, record: AverageManifest | AssessmentRecord, *, did: str) -> None:
        try:
            commit(self._store, key, record)
        except ConflictError:
            raise FencedError(
                f"average {self.name!r} of run {self.run_id}: another averager has {did} generation "
                f"{record.generation}"
            ) from None


def headline(assessment: Assessment) -> float | None:
    """The held-out loss of the averaged weights, or None when it was not measured or not finite."""
    return assessment.averaged.metrics.get(HEADLINE_METRIC) if assessment.averaged else None
