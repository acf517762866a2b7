"""Reads from the bucket what the retention planner wants to know of a run, and lists its objects.

Records never change, so what was read once is remembered, in a few numbers each; looking again costs what is new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.catalog.average_survey import AverageSurvey, Wanted
from wa_core.catalog.averages import Generations
from wa_core.catalog.retention import RunPicture
from wa_core.catalog.runs import RunLog, fetch_spec, requested_averages
from wa_core.records import CheckpointCommitted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from wa_core.catalog.retention import AveragePicture
    from wa_core.clock import Clock
    from wa_core.records import AverageRequest
    from wa_core.store.base import ObjectInfo, ObjectStore


@dataclass(frozen=True, slots=True)
class Surveyed:
    """A run's picture, and its objects; they were listed before the picture was taken."""

    picture: RunPicture
    objects: list[ObjectInfo]


class Survey:
    """One run's records.

    Args:
        store: the bucket.
        run_id: the run.
        clock: the time source.
        depth: how many records of each average to read at most in one go; None for no limit. What has not been
            read yet is kept.

    Raises:
        RunNotFoundError: there is no such run.
    """

    def __init__(self, store: ObjectStore, run_id: str, *, clock: Clock, depth: int | None = None) -> None:
        self._store = store
        self._run_id = run_id
        self._depth = depth
        self._spec = fetch_spec(store, run_id)
        self._log = RunLog(store, run_id, clock=clock)
        self._averages: dict[str, AverageSurvey] = {}

    @property
    def is_over(self) -> bool:
        """Whether the run had ended when it was last looked at."""
        return self._log.state.is_terminal

    def take(self, *, is_whole: bool = False) -> Surveyed:
        """Look at the run as it is now.

        Args:
            is_whole: list all of its objects, records too, and not only those that may ever go.

        Raises:
            CorruptError: its log cannot be read.
            TransientError: the store is away.
        """
        self._log.refresh()
        self._log.renew_hint()
        listed_after = len(self._log.entries)
        objects = self._list(is_whole=is_whole)
        # Records after objects: what was uploaded in between is not listed, and what is listed has its record, if
        # it has one at all.
        self._log.refresh()
        picture = RunPicture(
            run_id=self._run_id,
            policy=self._spec.request.checkpoint,
            entries=tuple(self._log.entries),
            listed_after=listed_after,
            averages=self._look_at_averages(objects),
            losses=self._losses(),
        )
        return Surveyed(picture, objects)

    def has_moved(self) -> bool:
        """Whether the log has grown, or something was published, since the run was looked at."""
        return bool(self._log.refresh()) or any(average.has_moved() for average in self._averages.values())

    def _list(self, *, is_whole: bool) -> list[ObjectInfo]:
        if is_whole:
            return list(self._store.list(layout.run_prefix(self._run_id)))
        prefixes = [layout.checkpoints_prefix(self._run_id)]
        prefixes += [layout.blobs_prefix(self._run_id, average.name) for average in self._requested()]
        return [info for prefix in prefixes for info in self._store.list(prefix)]

    def _look_at_averages(self, objects: Iterable[ObjectInfo]) -> list[AveragePicture]:
        files: dict[str, dict[str, str]] = {}
        for info in objects:
            if (found := layout.blob_of(info.key)) is not None:
                files.setdefault(found[0], {})[info.key] = found[1]
        policy = self._spec.request.checkpoint
        wanted = Wanted(
            path=frozenset(entry.seq for entry in self._log.lineage),
            is_over=self.is_over,
            windows=not policy.keeps_all,
            losses=policy.keep_best is not None,
        )
        return [self._average(asked).look(files.get(asked.name, {}), wanted) for asked in self._requested()]

    def _requested(self) -> list[AverageRequest]:
        return requested_averages(self._spec, self._log.entries)

    def _average(self, request: AverageRequest) -> AverageSurvey:
        if request.name not in self._averages:
            generations = Generations(self._store, self._run_id, request.name)
            self._averages[request.name] = AverageSurvey(generations, request, depth=self._depth)
        return self._averages[request.name]

    def _losses(self) -> dict[int, float] | None:
        """Held-out losses of raw checkpoints by log seq, None while some have not been read.

        An assessment names a step alone, and a step may have been trained twice: the checkpoint meant is the
        newest of that step that its generation has passed.
        """
        if not all(average.are_losses_known for average in self._averages.values()):
            return None
        seqs: dict[int, list[int]] = {}
        for entry in self._log.entries:
            if isinstance(entry, CheckpointCommitted):
                seqs.setdefault(entry.step, []).append(entry.seq)
        losses: dict[int, float] = {}
        for average in self._averages.values():
            for step, cursor, loss in average.losses():
                passed = [seq for seq in seqs.get(step, ()) if seq <= cursor]
                losses |= dict.fromkeys(passed[-1:], loss)
        return losses
