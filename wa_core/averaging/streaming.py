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

import numpy as np
import torch

from wa_core.averaging.chains import parts_of, plan_chains
from wa_core.averaging.files.passes import USUAL_PACE, reading
from wa_core.errors import CorruptError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from wa_core.averaging.buffers import Raw
    from wa_core.averaging.chains import Chain
    from wa_core.averaging.files.passes import Pace, Pass
    from wa_core.averaging.files.sources import FilesSource
    from wa_core.averaging.files.stored import Stretch
    from wa_core.averaging.streamed_shadow import StreamedShadow

# Elements folded at a time: a block stays in cache while it is checked, converted and folded into every average.
BLOCK = 1 << 16


@dataclass(frozen=True, slots=True)
class FoldReport:
    """What one fold did: which shadows took it (in the order given), bytes of data read, digests by file."""

    is_folded: tuple[bool, ...]
    read_bytes: int
    sha256: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Block:
    """Elements of a chain, from `begin` on, found sound; `values` is None unless its dtype is a float."""

    chain: Chain
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

    In memory are a few stretches, and the running means whose variances are pooled.

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
    fold = _Fold(source, counting)
    with _one_thread(), reading(source, pace=pace, digests=digests) as passing:
        arriving = fold.arriving(passing, on_read=on_read, block=block)
        # A small checkpoint is looked at in full before anything changes.
        fold.take(list(arriving) if passing.is_whole else arriving)
        sha256 = passing.sha256()
        fold.finish(step)
    return FoldReport(is_folded, source.data_bytes, sha256)


class _Fold:
    """One checkpoint on its way into all shadows that count it."""

    def __init__(self, source: FilesSource, weights: Mapping[StreamedShadow, float]) -> None:
        for shadow in weights:
            shadow.check(source)
        self._source = source
        self._weights = weights
        self._chains = plan_chains(source, weights)
        pooled = {source.ties.get(name, name) for shadow in weights for name in shadow.pooled_means()}
        self._means = {name: np.empty(source.tensors[name].size_bytes, np.uint8) for name in pooled}

    def arriving(self, passing: Pass, *, on_read: Callable[[int], None] | None, block: int) -> Iterator[_Block]:
        """All data, in blocks that have been looked at."""
        for stretch, raw in passing.arrivals():
            for chain, begin, end in parts_of(self._chains[stretch.file], stretch):
                part = raw[begin - stretch.begin : end - stretch.begin]
                yield from self._sound_blocks(chain, (begin - chain.begin) // chain.item_bytes, part, block=block)
            if self._means:
                self._keep_means(stretch, raw)
            if on_read is not None:
                on_read(len(raw))

    def take(self, blocks: Iterable[_Block]) -> None:
        """Fold them into every shadow."""
        for shadow in self._weights:
            shadow.begin_fold()
        for block in blocks:
            for target in block.chain.targets:
                begin = target.begin + block.begin * target.item_bytes
                for shadow in target.shadows:
                    if block.values is None or target.is_latest:
                        shadow.keep(begin, block.raw)
                    else:
                        shadow.blend(begin, block.values, dtype=target.dtype, weight=self._weights[shadow])

    def finish(self, step: int) -> None:
        """All data has been taken and is the recorded one."""
        tensors, ties = self._source.tensors, self._source.ties
        means = {
            name: _numbers(raw, getattr(torch, tensors[name].spec.dtype)) for name, raw in self._means.items()
        }
        for shadow, weight in self._weights.items():
            shadow.pool({name: means[ties.get(name, name)] for name in shadow.pooled_means()}, weight=weight)
        for shadow, weight in self._weights.items():
            shadow.finish_fold(step, weight)

    def _keep_means(self, stretch: Stretch, raw: Raw) -> None:
        for piece, part in stretch.cut(raw):
            if piece.tensor.spec.name in self._means:
                self._means[piece.tensor.spec.name][piece.begin : piece.end] = part

    def _sound_blocks(self, chain: Chain, begin: int, raw: Raw, *, block: int) -> Iterator[_Block]:
        dtype, item = chain.dtype, chain.item_bytes
        for at in range(0, len(raw), block * item):
            part = raw[at : at + block * item]
            first = begin + at // item
            if not dtype.is_floating_point:
                if dtype == torch.bool and part.max() > 1:
                    raise self._bad_bool(chain, first + int(part.argmax()))
                yield _Block(chain, first, part, None)
                continue
            values = _numbers(part, dtype)
            if not _is_finite(values):
                raise self._not_finite(chain, first + int(torch.isfinite(values).logical_not_().nonzero()[0]))
            yield _Block(chain, first, part, values)

    def _bad_bool(self, chain: Chain, element: int) -> CorruptError:
        name, _ = chain.find(element)
        return CorruptError(
            f"{self._source.name}: tensor {name!r} is bool but has bytes other than 0 and 1; the file is "
            f"damaged, save it again",
            code="bad_value",
        )

    def _not_finite(self, chain: Chain, element: int) -> CorruptError:
        name, first = chain.find(element)
        return CorruptError(
            f"{self._source.name}: tensor {name!r} has values that are NaN or infinite (the first at element "
            f"{first}); the training has diverged here",
            code="not_finite",
        )


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


def _numbers(raw: Raw, dtype: torch.dtype) -> Tensor:
    aligned = raw if raw.ctypes.data % dtype.itemsize == 0 else raw.copy()
    values = torch.from_numpy(aligned).view(dtype)
    # Exact, and once for all averages.
    return values if dtype.itemsize > 2 else values.float()  # noqa: PLR2004 - float32 and float64 as they are


def _is_finite(values: Tensor) -> bool:
    # NaN and infinity survive in a sum, which costs a tenth of looking at every value; but a sum may overflow.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())
