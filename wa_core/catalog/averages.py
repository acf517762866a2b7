"""Generations: the numbered, create-once manifests of one average.

Two workers that build on the same generation both try to create the next number; one wins, and the other is
fenced: it drops what it holds and reads again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.catalog.commit import commit, parse
from wa_core.errors import AverageNotFoundError, ConflictError, FencedError, ObjectNotFoundError
from wa_core.records import AverageManifest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.store.base import ObjectStore


class Generations:
    """The generations of one average. Reads go to the store; nothing is cached."""

    def __init__(self, store: ObjectStore, run_id: str, name: str) -> None:
        self.run_id = run_id
        self.name = name
        self._store = store

    def numbers(self) -> list[int]:
        """The generations that exist, ascending."""
        prefix = layout.generations_prefix(self.run_id, self.name)
        found = (layout.number_of(info.key) for info in self._store.list(prefix, delimiter="/"))
        return [number for number in found if number is not None]

    def fetch(self, number: int) -> AverageManifest:
        """Read one generation.

        Raises:
            AverageNotFoundError: it does not exist.
            CorruptError: it cannot be read.
        """
        key = layout.generation(self.run_id, self.name, number)
        try:
            body = self._store.get(key)
        except ObjectNotFoundError:
            raise AverageNotFoundError(
                f"average {self.name!r} of run {self.run_id} has no generation {number}"
            ) from None
        return parse(AverageManifest.model_validate_json, body, key=key)

    def newest(self) -> AverageManifest | None:
        """The newest generation, or None before the first."""
        return next(self.newest_first(), None)

    def newest_first(self) -> Iterator[AverageManifest]:
        """All generations, the newest first."""
        return (self.fetch(number) for number in reversed(self.numbers()))

    def commit(self, manifest: AverageManifest) -> None:
        """Publish a generation.

        Raises:
            FencedError: another worker has published this generation first.
            TransientError: the store is away; committing the same manifest again is safe.
        """
        try:
            commit(self._store, layout.generation(self.run_id, self.name, manifest.generation), manifest)
        except ConflictError:
            raise FencedError(
                f"average {self.name!r} of run {self.run_id}: another averager has published generation "
                f"{manifest.generation}"
            ) from None
