"""The streaming fold: one checkpoint, read once, into as many averages as count it.

Blocks are folded as they arrive, while they are in the processor's cache, so neither the checkpoint nor anything
of its size but the accumulators is ever in memory; and the accumulators may be in a scratch file. It knows sources
and shadows; not runs or generations. The invariant: the accumulators have the bits that `ShadowWeights` of the
same rule and dtype would have, for any cut into blocks; a shadow that a failed fold has touched cannot be used.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from wa_core.averaging.files.prefetch import NUM_CONNECTIONS, STRETCH_BYTES, prefetched
from wa_core.errors import CorruptError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from wa_core.averaging.files.blocks import Raw
    from wa_core.averaging.files.sources import FilesSource, Piece, Stretch
    from wa_core.averaging.streamed import Slot, StreamedShadow

# Elements folded at a time: a block stays in cache while it is checked, converted and folded into every average.
BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What one fold did: which shadows took it (in the order given), bytes of data read, digests by file."""

    is_folded: tuple[bool, ...]
    read_bytes: int
    sha256: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Target:
    """Where one stored tensor goes in one shadow."""

    shadow: StreamedShadow
    slot: Slot
    weight: float


def fold_source(
    source: FilesSource,
    shadows: Sequence[StreamedShadow],
    *,
    step: int,
    digests: bool = False,
    block: int = BLOCK,
    stretch_bytes: int = STRETCH_BYTES,
    num_connections: int = NUM_CONNECTIONS,
) -> FoldReport:
    """Fold one checkpoint into every shadow whose rule counts it; each byte is read once.

    Names, shapes and dtypes are checked before anything is read. Finiteness, and digests where there are records,
    are checked in the same single read; when they fail, or the read does, the shadows are `is_broken` and have to
    be restored from what was last kept of them.

    Args:
        source: the checkpoint.
        shadows: the averages, each at its own point.
        step: the optimizer step it was taken at.
        digests: compute the files' SHA-256 also when there is no record to compare with.
        block: elements folded at a time; the bits do not depend on it, nor on the next two.
        stretch_bytes: bytes asked for at a time.
        num_connections: requests under way at a time.

    Raises:
        InvalidInputError: `step` does not go forward, or a shadow is broken.
        IncompatibleError: names, shapes, dtypes or ties are not those of the first checkpoint.
        CorruptError: NaN, infinity, bools other than 0 and 1, or other bytes than recorded.
        StoreUnavailableError: the source or the scratch file cannot be reached.
    """
    counting = {shadow: weight for shadow in shadows if (weight := shadow.next_weight(step)) is not None}
    is_folded = tuple(shadow in counting for shadow in shadows)
    if not counting:
        return FoldReport(is_folded, 0, {})
    targets = _targets(source, counting)
    with _breaking(counting), _one_thread(), _Hashing(source, is_on=digests or source.has_records) as hashing:
        read_bytes = 0
        with prefetched(source, stretch_bytes=stretch_bytes, num_connections=num_connections) as arrivals:
            for stretch, raw in arrivals:
                hashing.add(stretch, raw)
                for piece, part in _pieces(stretch, raw):
                    _fold_piece(source.name, piece, part, targets[piece.tensor.spec.name], block=block)
                read_bytes += len(raw)
                hashing.wait()
        sha256 = hashing.finish()
        for shadow, weight in counting.items():
            shadow.finish_fold(step, weight)
    return FoldReport(is_folded, read_bytes, sha256)


def _targets(source: FilesSource, weights: Mapping[StreamedShadow, float]) -> dict[str, list[_Target]]:
    for shadow in weights:
        shadow.check(source)
    found: dict[str, list[_Target]] = {name: [] for name in source.tensors}
    for shadow, weight in weights.items():
        for slot in shadow.slots():
            found[source.ties.get(slot.name, slot.name)].append(_Target(shadow, slot, weight))
    return found


@contextmanager
def _breaking(shadows: Mapping[StreamedShadow, float]) -> Iterator[None]:
    # Until the fold is done, some blocks have it and others do not.
    for shadow in shadows:
        shadow.is_broken = True
    yield
    for shadow in shadows:
        shadow.is_broken = False


@contextmanager
def _one_thread() -> Iterator[None]:
    # Blocks are too small to share out: torch's threads would spend their time waiting for each other, spinning on
    # the processors that fetch and hash (measured: 10 to 40 times the time on 2 busy cores).
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _pieces(stretch: Stretch, raw: Raw) -> Iterator[tuple[Piece, Raw]]:
    at = 0
    for piece in stretch.pieces:
        size = piece.end - piece.begin
        yield piece, raw[at : at + size]
        at += size


def _fold_piece(source: str, piece: Piece, raw: Raw, targets: Sequence[_Target], *, block: int) -> None:
    tensor = piece.tensor
    name, item = tensor.spec.name, tensor.item_bytes
    dtype: torch.dtype = getattr(torch, tensor.spec.dtype)
    for at in range(0, len(raw), block * item):
        part, begin = raw[at : at + block * item], (piece.begin + at) // item
        if not dtype.is_floating_point:
            if dtype == torch.bool and part.max() > 1:
                raise CorruptError(
                    f"{source}: tensor {name!r} is bool but has bytes other than 0 and 1; the file is damaged",
                    code="bad_value",
                )
            for target in targets:
                target.shadow.keep(target.slot, begin, part)
            continue
        values = _numbers(part, dtype, item=item)
        if not _is_finite(values):
            raise CorruptError(
                f"{source}: tensor {name!r} has values that are NaN or infinite, between elements {begin} and "
                f"{begin + values.numel()}; the training has diverged here",
                code="not_finite",
            )
        for target in targets:
            target.shadow.blend(target.slot, begin, values, weight=target.weight)


def _numbers(raw: Raw, dtype: torch.dtype, *, item: int) -> Tensor:
    aligned = raw if raw.ctypes.data % item == 0 else raw.copy()
    values = torch.from_numpy(aligned).view(dtype)
    # Exact, and once for all averages.
    return values if item > 2 else values.float()  # noqa: PLR2004 - float32 and float64 as they are


def _is_finite(values: Tensor) -> bool:
    # NaN and infinity survive in a sum, which costs a tenth of looking at every value; but a sum may overflow.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


class _Hashing:
    """The files' digests, taken in a thread beside the fold: hashing lets go of the interpreter's lock."""

    def __init__(self, source: FilesSource, *, is_on: bool) -> None:
        self._source = source
        self._digests = source.start_digests() if is_on else []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._wait: Callable[[], object] = lambda: None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def add(self, stretch: Stretch, raw: Raw) -> None:
        """Begin to take a stretch in; `raw` must stay until `wait`."""
        if self._digests:
            self._wait = self._pool.submit(self._digests[stretch.file].update, raw.data).result

    def wait(self) -> None:
        """Until the last stretch is taken in."""
        self._wait()

    def finish(self) -> dict[str, str]:
        """The digests, compared with the records."""
        found = [digest.hexdigest() for digest in self._digests]
        return self._source.check_digests(found) if found else {}
