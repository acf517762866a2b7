"""One pass over a checkpoint: all its data, read once, in file order, with the files' digests.

It knows sources, buffers and threads; not what the data is for. The invariant: every byte is read once; a small
checkpoint is handed over when all of it is there and its digests hold, a larger one stretch by stretch, with its
digests at the end, and no more than a few stretches of it are ever in memory.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from wa_core.averaging.files.prefetch import NUM_CONNECTIONS, STRETCH_BYTES, prefetched

if TYPE_CHECKING:
    import hashlib
    from collections.abc import Callable, Iterator, Sequence

    from wa_core.averaging.buffers import Raw
    from wa_core.averaging.files.sources import FilesSource
    from wa_core.averaging.files.stored import Stretch


@dataclass(frozen=True, slots=True)
class Pace:
    """How a checkpoint is read: bytes asked for at a time, and requests under way at a time.

    One that has no more data than `stretch_bytes` is read without any thread.
    """

    stretch_bytes: int = STRETCH_BYTES
    num_connections: int = NUM_CONNECTIONS


USUAL_PACE = Pace()


class Pass(Protocol):
    """A pass that has begun."""

    @property
    def is_whole(self) -> bool:
        """Whether all data is in memory, for as long as it is needed, and its digests hold."""
        ...

    def arrivals(self) -> Iterator[tuple[Stretch, Raw]]:
        """All data, once; with `is_whole` false each stretch is valid until the next is asked for.

        Raises:
            CorruptError: a file became shorter (`truncated_data`).
            StoreUnavailableError: the store is away, or the disk fails.
        """
        ...

    def sha256(self) -> dict[str, str]:
        """File name -> digest in hex, once all data has arrived; empty when nobody asked and nothing is recorded.

        Raises:
            CorruptError: a file is not the recorded one (`digest_mismatch`).
        """
        ...


@contextmanager
def reading(source: FilesSource, *, pace: Pace = USUAL_PACE, digests: bool = False) -> Iterator[Pass]:
    """Begin a pass over `source`.

    Args:
        source: the checkpoint.
        pace: how it is read; what arrives does not depend on it, only how it is cut.
        digests: take digests also where there is no record to compare with.

    Raises:
        CorruptError, StoreUnavailableError: as for `Pass`, when the checkpoint is a small one.
    """
    started = source.start_digests() if digests or source.has_records else []
    if source.data_bytes <= pace.stretch_bytes:
        yield _Whole(source, started)
        return
    with prefetched(source, stretch_bytes=pace.stretch_bytes, num_connections=pace.num_connections) as stretches:
        passing = _Passing(source, stretches, started)
        try:
            yield passing
        finally:
            passing.close()


class _Whole:
    """A small checkpoint, read and checked."""

    is_whole = True

    def __init__(self, source: FilesSource, digests: Sequence[hashlib._Hash]) -> None:
        self._parts: list[tuple[Stretch, Raw]] = []
        # One stretch for each file.
        for stretch in source.stretches(max(source.size_bytes, 1)):
            raw = np.empty(stretch.end - stretch.begin, np.uint8)
            source.read_stretch(stretch, raw.data)
            if digests:
                digests[stretch.file].update(raw.data)
            self._parts.append((stretch, raw))
        self._sha256 = source.check_digests([digest.hexdigest() for digest in digests]) if digests else {}

    def arrivals(self) -> Iterator[tuple[Stretch, Raw]]:
        """All data."""
        return iter(self._parts)

    def sha256(self) -> dict[str, str]:
        """The digests."""
        return self._sha256


class _Passing:
    """A large checkpoint; digests are taken in a thread beside: hashing lets go of the interpreter's lock."""

    is_whole = False

    def __init__(
        self,
        source: FilesSource,
        stretches: Iterator[tuple[Stretch, Raw]],
        digests: Sequence[hashlib._Hash],
    ) -> None:
        self._source = source
        self._stretches = stretches
        self._digests = digests
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="digest")

    def arrivals(self) -> Iterator[tuple[Stretch, Raw]]:
        """All data, stretch by stretch."""
        for stretch, raw in self._stretches:
            hashed: Callable[[], object] | None = None
            if self._digests:
                hashed = self._pool.submit(self._digests[stretch.file].update, raw.data).result
            yield stretch, raw
            if hashed is not None:
                hashed()

    def sha256(self) -> dict[str, str]:
        """The digests, compared with the records."""
        found = [digest.hexdigest() for digest in self._digests]
        return self._source.check_digests(found) if found else {}

    def close(self) -> None:
        """Stop hashing."""
        self._pool.shutdown()
