"""The history of an average: what each generation held, when it was published, and how it measured.

It knows the catalogue and keeps a few numbers of each generation, which never change; whole manifests and
assessments grow with the run and its model, and are not kept for it. A page costs one listing, and the records
that nobody has asked for before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from services.api.answers.resources import evaluation_set
from services.api.schemas import EvaluationSet, GenerationPage, GenerationResource
from wa_core.catalog.averages import Generations
from wa_core.records import CheckpointCommitted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from services.api.state.catalog import Catalog
    from wa_core.records import AssessmentRecord, AverageManifest, BatchNormSummary

MAX_PAGE = 500
_MAX_KEPT = 16_384


@dataclass(frozen=True, slots=True)
class _Facts:
    """One generation, in short. `newest_seq` is that of the newest checkpoint in it; None when there is none."""

    generation: int
    created_at: datetime
    cursor: int
    n_averaged: int
    last_step: int | None
    newest_seq: int | None
    published_at: datetime | None
    evaluation: EvaluationSet
    batchnorm: BatchNormSummary | None


class History:
    """Reads histories through `catalog`. Methods may be called from several threads."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        # Whether it is assessed is in the key: what was read before an assessment came is not what there is after.
        self._facts = lru_cache(maxsize=_MAX_KEPT)(self._read)

    def page(self, run_id: str, name: str, *, after: int, limit: int, is_whole: bool) -> GenerationPage:
        """The generations after number `after`, at most `limit`.

        Args:
            run_id: the run.
            name: the average.
            after: a generation's number; 0 begins at the first.
            limit: how many.
            is_whole: with those that were never assessed.

        Raises:
            NotFoundError: there is no such run or average.
        """
        self._catalog.wanted(run_id, name)
        generations = Generations(self._catalog.store, run_id, name)
        assessed = set(generations.assessed_numbers(after=after))
        numbers = generations.numbers(after=after) if is_whole else sorted(assessed)
        page = [(number, number in assessed) for number in numbers[:limit]]
        found = self._catalog.side_by_side(lambda known: self._facts(run_id, name, *known), page)
        entries = self._catalog.entries(run_id)
        # Of abandoned branches, too: an old generation may be of one.
        checkpoints = {entry.seq: entry for entry in entries if isinstance(entry, CheckpointCommitted)}
        return GenerationPage(
            data=[_resource(facts, checkpoints) for facts in found],
            has_more=len(numbers) > limit,
            next=page[-1][0] if page else after,
        )

    def _read(self, run_id: str, name: str, number: int, is_assessed: bool) -> _Facts:  # noqa: FBT001  a cache key
        generations = Generations(self._catalog.store, run_id, name)
        return _facts(generations.fetch(number), generations.fetch_assessment(number) if is_assessed else None)


def _facts(manifest: AverageManifest, record: AssessmentRecord | None) -> _Facts:
    assessment = record.assessment if record else None
    return _Facts(
        generation=manifest.generation,
        created_at=manifest.at,
        cursor=manifest.cursor,
        n_averaged=manifest.n_averaged,
        last_step=manifest.last_step,
        newest_seq=max(manifest.folded, default=None),
        published_at=record.at if record else None,
        evaluation=evaluation_set(assessment),
        batchnorm=assessment.batchnorm.model_copy(update={"layers": []}) if assessment else None,
    )


def _resource(facts: _Facts, checkpoints: Mapping[int, CheckpointCommitted]) -> GenerationResource:
    looked_at, newest = checkpoints.get(facts.cursor), checkpoints.get(facts.newest_seq or 0)
    committed_at = newest.at if newest else None
    lag = facts.published_at - committed_at if facts.published_at and committed_at else None
    return GenerationResource(
        generation=facts.generation,
        step=looked_at.step if looked_at else facts.last_step,
        n_averaged=facts.n_averaged,
        created_at=facts.created_at,
        last_step=facts.last_step,
        checkpoint_committed_at=committed_at,
        published_at=facts.published_at,
        lag_s=max(0.0, lag.total_seconds()) if lag is not None else None,  # of clocks that differ
        evaluation=facts.evaluation,
        batchnorm=facts.batchnorm,
    )
