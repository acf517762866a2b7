"""The work of an offline merge, cut into tiles: one stretch of one tensor, read from every source in turn.

It knows open sources, coefficients, decisions and a writer; it decides nothing itself. The invariant: every tile
is computed by itself, from all sources in their order, so neither the tiles' size nor the number of threads shows
in the bits; the first error stops all threads.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wa_core.averaging.buffers import Raw, new_buffer
from wa_core.averaging.files.blocks import AccumulatorDtype, Rounding, WeightedSum, is_finite, widen
from wa_core.averaging.tensor_policy import Policy, partner_of
from wa_core.errors import CorruptError, IncompatibleError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from wa_core.averaging.files.blocks import Floats
    from wa_core.averaging.files.output import Writer
    from wa_core.averaging.files.sources import Source
    from wa_core.averaging.files.stored import StoredTensor
    from wa_core.averaging.tensor_policy import Decision

_WIDEST_BYTES = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """Elements `begin` up to `end` of one tensor; of both tensors of a pooled pair, which the mean stands for."""

    tensor: StoredTensor
    policy: Policy
    begin: int
    end: int


class Merge:
    """One merge: what every thread shares.

    Args:
        sources: those that take part, in the order of their steps.
        coefficients: one for each.
        tensors: those of the output.
        decisions: what becomes of each, by name.
        writer: takes the result; `begin` has been called.
        accumulator: what is summed in.
        tile_elements: how much is read of one source at a time.
        on_read: told the bytes read, after every tile.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        coefficients: Sequence[float],
        tensors: Sequence[StoredTensor],
        decisions: Mapping[str, Decision],
        writer: Writer,
        accumulator: AccumulatorDtype,
        tile_elements: int,
        on_read: Callable[[int], None],
    ) -> None:
        self.sources = sources
        self.coefficients = coefficients
        self.writer = writer
        self.accumulator = accumulator
        self.max_elements = tile_elements
        self.tensors = {tensor.spec.name: tensor for tensor in tensors}
        self.on_read = on_read
        self._decisions = decisions
        self._lock = threading.Lock()
        self._tiles = self._plan()
        self._is_stopped = False

    def run(self, *, num_threads: int) -> None:
        """Do all tiles; the first error of any thread is raised, after all have stopped."""
        with ThreadPoolExecutor(num_threads, thread_name_prefix="merge") as pool:
            try:
                for done in [pool.submit(self._work) for _ in range(num_threads)]:
                    done.result()
            finally:
                self._is_stopped = True

    def _work(self) -> None:
        worker = _Worker(self)
        try:
            # NaN and infinity are found by looking, not by numpy's warnings.
            with np.errstate(all="ignore"):
                while (tile := self._next()) is not None:
                    worker.do(tile)
        finally:
            # Also when all is done: the others have nothing left to begin either.
            self._is_stopped = True

    def _next(self) -> Tile | None:
        with self._lock:
            return None if self._is_stopped else next(self._tiles, None)

    def _plan(self) -> Iterator[Tile]:
        for name, tensor in self.tensors.items():
            policy = self._decisions[name].policy
            if policy is Policy.POOLED_VAR:
                continue
            num = tensor.num_elements
            for begin in range(0, num, self.max_elements):
                yield Tile(tensor, policy, begin, min(num, begin + self.max_elements))


class _Worker:
    """One thread's memory: a tile's bytes and its sum."""

    def __init__(self, merge: Merge) -> None:
        self._merge = merge
        self._bytes = new_buffer(merge.max_elements * _WIDEST_BYTES)
        self._sum = WeightedSum(merge.coefficients, max_elements=merge.max_elements, accumulator=merge.accumulator)
        self._rounding = Rounding(max_elements=merge.max_elements)

    def do(self, tile: Tile) -> None:
        """Read, compute and write one tile, unless a killed merge has done that."""
        if self._is_written(tile):
            return
        if tile.policy is Policy.LATEST:
            self._copy_latest(tile)
        elif tile.policy is Policy.POOLED_MEAN:
            self._pool(tile)
        else:
            self._average(tile)

    def _is_written(self, tile: Tile) -> bool:
        names = [tile.tensor.spec.name]
        if tile.policy is Policy.POOLED_MEAN:
            names.append(partner_of(names[0]))
        tensors = [self._merge.tensors[name] for name in names]
        return all(
            self._merge.writer.has(
                tensor.spec.name, tile.begin * tensor.item_bytes, (tile.end - tile.begin) * tensor.item_bytes
            )
            for tensor in tensors
        )

    def _average(self, tile: Tile) -> None:
        tensor = tile.tensor
        self._sum.begin(tile.end - tile.begin, tensor.dtype)
        for source in self._merge.sources:
            self._sum.add(self._read(source, tensor, tile))
        values = self._sum.values()
        if not self._sum.has_only_finite(values):
            self._refuse(tensor, tile)
        self._write(tensor, tile, values)

    def _copy_latest(self, tile: Tile) -> None:
        raw = self._read(self._merge.sources[-1], tile.tensor, tile)
        if tile.tensor.dtype == "BOOL" and raw.max(initial=0) > 1:
            raise CorruptError(
                f"{self._merge.sources[-1].name}: tensor {tile.tensor.spec.name!r} is bool but has bytes other "
                f"than 0 and 1; the file is damaged, save it again",
                code="bad_value",
            )
        if not is_finite(raw, tile.tensor.dtype):
            self._refuse(tile.tensor, tile)
        self._merge.writer.write(tile.tensor.spec.name, tile.begin * tile.tensor.item_bytes, raw.data)

    def _pool(self, tile: Tile) -> None:
        """Mean of means, and mean of variances plus variance of means: the moments of the mixture."""
        mean = self._mean_of(tile.tensor, tile, lambda source: self._read_wide(source, tile.tensor, tile)).copy()
        variance_tensor = self._merge.tensors[partner_of(tile.tensor.spec.name)]

        def moment(source: Source) -> Floats:
            spread: Floats = self._read_wide(source, tile.tensor, tile) - mean
            found: Floats = self._read_wide(source, variance_tensor, tile) + spread * spread
            return found

        variance = self._mean_of(variance_tensor, tile, moment)
        self._write(tile.tensor, tile, mean)
        # Coefficients below zero could carry it there too.
        self._write(variance_tensor, tile, np.maximum(variance, 0.0))

    def _mean_of(self, tensor: StoredTensor, tile: Tile, values_of: Callable[[Source], Floats]) -> Floats:
        self._sum.begin(tile.end - tile.begin, "F64")
        for source in self._merge.sources:
            self._sum.add(values_of(source).view(np.uint8))
        values = self._sum.values()
        if not self._sum.has_only_finite(values):
            self._refuse(tensor, tile)
        return values

    def _read_wide(self, source: Source, tensor: StoredTensor, tile: Tile) -> Floats:
        return widen(self._read(source, tensor, tile), tensor.dtype).astype(np.float64)

    def _read(self, source: Source, tensor: StoredTensor, tile: Tile) -> Raw:
        raw = self._bytes[: (tile.end - tile.begin) * tensor.item_bytes]
        name = tensor.spec.name
        source.read_into(source.ties.get(name, name), tile.begin * tensor.item_bytes, raw.data)
        self._merge.on_read(len(raw))
        return raw

    def _write(self, tensor: StoredTensor, tile: Tile, values: Floats) -> None:
        raw = self._rounding.narrow(values, tensor.dtype)
        if min(self._merge.coefficients) < 0 and not is_finite(raw, tensor.dtype):
            raise _overflow(tensor)
        self._merge.writer.write(tensor.spec.name, tile.begin * tensor.item_bytes, raw.data)

    def _refuse(self, tensor: StoredTensor, tile: Tile) -> None:
        for source in self._merge.sources:
            values = widen(self._read(source, tensor, tile), tensor.dtype)
            bad = np.flatnonzero(~np.isfinite(values))
            if bad.size:
                raise CorruptError(
                    f"{source.name}: tensor {tensor.spec.name!r} has values that are NaN or infinite (the first "
                    f"at element {tile.begin + int(bad[0])}); the training has diverged here; leave this "
                    f"checkpoint out",
                    code="not_finite",
                )
        raise _overflow(tensor)


def _overflow(tensor: StoredTensor) -> IncompatibleError:
    return IncompatibleError(
        f"the average of tensor {tensor.spec.name!r} does not fit into {tensor.spec.dtype}; its values are near "
        f"the end of the range, convert the checkpoints to a wider dtype",
        code="overflow",
    )
