"""The streaming fold: one checkpoint, read once, into as many averages as count it.

Blocks are folded as they arrive, while they are in the processor's cache, so neither the checkpoint nor anything
of its size but the accumulators is ever in memory; and the accumulators may be in a scratch file. It knows sources
and shadows; not runs or generations. The invariant: the accumulators have the bits that `ShadowWeights` of the
same rule and dtype would have, for any cut into blocks; a shadow that a failed fold has touched cannot be used.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from wa_core.averaging.files.passes import USUAL_PACE, reading
from wa_core.averaging.pairs import Pairs, PairTarget
from wa_core.averaging.tensor_policy import Policy, partner_of
from wa_core.errors import CorruptError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from wa_core.averaging.files.blocks import Raw
    from wa_core.averaging.files.passes import Pace, Pass
    from wa_core.averaging.files.sources import FilesSource, Piece
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


@dataclass(frozen=True, slots=True)
class _Block:
    """Some elements of one tensor, from `begin` on, found sound; `values` is None unless its dtype is a float."""

    name: str
    begin: int
    raw: Raw
    values: Tensor | None


def fold_source(
    source: FilesSource,
    shadows: Sequence[StreamedShadow],
    *,
    step: int,
    verify: bool = False,
    digests: bool = False,
    on_read: Callable[[int], None] | None = None,
    pace: Pace = USUAL_PACE,
    block: int = BLOCK,
) -> FoldReport:
    """Fold one checkpoint into every shadow whose rule counts it; each byte is read once.

    Names, shapes and dtypes are checked before anything is read. Finiteness, and digests where there are records,
    are checked in the same single read. A checkpoint that fits into one stretch (`pace`) is read and checked whole
    before any shadow changes, so that a refused one leaves no trace. When a larger one is refused, or the read
    fails, the shadows are `is_broken` and have to be restored from what was last kept of them.

    In memory are a few stretches, and pairs of running means and variances whose other half is still to come.

    Args:
        source: the checkpoint.
        shadows: the averages, each at its own point.
        step: the optimizer step it was taken at.
        verify: read and check also when no shadow counts it; otherwise it is not read then.
        digests: compute the files' SHA-256 also when there is no record to compare with.
        on_read: told the number of bytes of each stretch once they are folded (of a small checkpoint: checked);
            what it raises ends the fold as any failure does.
        pace: how it is read; the bits do not depend on it.
        block: elements folded at a time; the bits do not depend on it either.

    Raises:
        InvalidInputError: `step` does not go forward, or a shadow is broken.
        IncompatibleError: names, shapes, dtypes or ties are not those of the first checkpoint, or a tensor cannot
            be averaged.
        CorruptError: NaN, infinity, bools other than 0 and 1, or other bytes than recorded.
        StoreUnavailableError: the source or the scratch file cannot be reached.
    """
    counting = {shadow: weight for shadow in shadows if (weight := shadow.next_weight(step)) is not None}
    is_folded = tuple(shadow in counting for shadow in shadows)
    if not counting and not verify:
        return FoldReport(is_folded, 0, {})
    targets = _Targets(source, counting)
    with _one_thread(), reading(source, pace=pace, digests=digests) as passing:
        arriving = _arriving(source, passing, on_read=on_read, block=block)
        # A small checkpoint is looked at in full before anything changes.
        sound = list(arriving) if passing.is_whole else arriving
        with _breaking(counting):
            for one in sound:
                targets.take(one)
            sha256 = passing.sha256()
            for shadow, weight in counting.items():
                shadow.finish_fold(step, weight)
    return FoldReport(is_folded, source.data_bytes, sha256)


class _Targets:
    """Where each tensor of a checkpoint goes, in all shadows."""

    def __init__(self, source: FilesSource, weights: Mapping[StreamedShadow, float]) -> None:
        for shadow in weights:
            shadow.check(source)
        self._by_name: dict[str, list[_Target]] = {name: [] for name in source.tensors}
        pairs: list[PairTarget] = []
        for shadow, weight in weights.items():
            for slot in shadow.slots():
                name = source.ties.get(slot.name, slot.name)
                if slot.policy is Policy.POOLED_MEAN:
                    partner = partner_of(slot.name)
                    pairs.append(PairTarget(shadow, slot, weight, name, source.ties.get(partner, partner)))
                elif slot.policy is not Policy.POOLED_VAR:
                    self._by_name[name].append(_Target(shadow, slot, weight))
        self._pairs = Pairs(pairs, sizes={name: tensor.num_elements for name, tensor in source.tensors.items()})

    def take(self, block: _Block) -> None:
        """Fold one block into every shadow."""
        for target in self._by_name[block.name]:
            if block.values is None or target.slot.policy is Policy.LATEST:
                target.shadow.keep(target.slot, block.begin, block.raw)
            else:
                target.shadow.blend(target.slot, block.begin, block.values, weight=target.weight)
        if block.values is not None:
            self._pairs.take(block.name, block.begin, block.values)


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


def _arriving(
    source: FilesSource, passing: Pass, *, on_read: Callable[[int], None] | None, block: int
) -> Iterator[_Block]:
    """All data, in blocks that have been looked at."""
    for stretch, raw in passing.arrivals():
        for piece, part in stretch.cut(raw):
            yield from _sound_blocks(source.name, piece, part, block=block)
        if on_read is not None:
            on_read(len(raw))


def _sound_blocks(source: str, piece: Piece, raw: Raw, *, block: int) -> Iterator[_Block]:
    name, item = piece.tensor.spec.name, piece.tensor.item_bytes
    dtype: torch.dtype = getattr(torch, piece.tensor.spec.dtype)
    for at in range(0, len(raw), block * item):
        part, begin = raw[at : at + block * item], (piece.begin + at) // item
        if not dtype.is_floating_point:
            if dtype == torch.bool and part.max() > 1:
                raise CorruptError(
                    f"{source}: tensor {name!r} is bool but has bytes other than 0 and 1; the file is damaged",
                    code="bad_value",
                )
            yield _Block(name, begin, part, None)
            continue
        values = _numbers(part, dtype, item=item)
        if not _is_finite(values):
            raise CorruptError(
                f"{source}: tensor {name!r} has values that are NaN or infinite, between elements {begin} and "
                f"{begin + values.numel()}; the training has diverged here",
                code="not_finite",
            )
        yield _Block(name, begin, part, values)


def _numbers(raw: Raw, dtype: torch.dtype, *, item: int) -> Tensor:
    aligned = raw if raw.ctypes.data % item == 0 else raw.copy()
    values = torch.from_numpy(aligned).view(dtype)
    # Exact, and once for all averages.
    return values if item > 2 else values.float()  # noqa: PLR2004 - float32 and float64 as they are


def _is_finite(values: Tensor) -> bool:
    # NaN and infinity survive in a sum, which costs a tenth of looking at every value; but a sum may overflow.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
