"""One average as the streaming fold keeps it: accumulators in memory or in a scratch file, block by block.

It is what `ShadowWeights` is for whole state dicts, with the same bits and the same kept form, so that either goes
on from the other's state. It knows a rule, specs and storage; not where checkpoints come from. The invariant:
outside of a fold every accumulator has taken the same checkpoints, or the shadow is marked as broken.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from wa_core.averaging.files.passes import reading
from wa_core.averaging.files.sources import specs_of
from wa_core.averaging.files.stored import StoredTensor
from wa_core.averaging.kernels import rounds_to_one
from wa_core.averaging.rules import require_lerp
from wa_core.averaging.scratch import FileStorage, MemoryStorage
from wa_core.averaging.slots import pairs_of, size_of, slots_of
from wa_core.averaging.snapshot import ShadowDescription, bad_shadow
from wa_core.errors import IncompatibleError, InvalidInputError, NoAverageYetError
from wa_core.header import DTYPE_BYTES
from wa_core.specs import TensorSpec, check_spec, format_dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from wa_core.averaging.buffers import Raw
    from wa_core.averaging.files.blocks import AccumulatorDtype
    from wa_core.averaging.files.output import Writer
    from wa_core.averaging.files.sources import FilesSource, Source
    from wa_core.averaging.rules import Rule
    from wa_core.averaging.scratch import Storage
    from wa_core.averaging.slots import Slot

_BLOCK_BYTES = 1 << 20


class StreamedShadow:
    """The running average of checkpoints under a rule; `wa_core.averaging.streaming.fold_source` folds into it.

    What becomes of each tensor is as in `wa_core.averaging.shadow.ShadowWeights`.

    Args:
        rule: how much each checkpoint counts.
        dtype: what is accumulated in; float64 tensors always in float64.
        latest: shell patterns of float tensors that keep their newest value.
        scratch_folder: where the accumulators' file is made; None keeps them in memory.

    Raises:
        InvalidInputError: the rule is a window, which cannot be folded, or the dtype is another one.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        dtype: AccumulatorDtype = "float32",
        latest: Iterable[str] = (),
        scratch_folder: Path | None = None,
    ) -> None:
        if dtype not in ("float32", "float64"):
            raise InvalidInputError(f"accumulators must be 'float32' or 'float64', not {dtype!r}")
        self.rule = require_lerp(rule)
        self.is_broken = False
        self._about = ShadowDescription(
            rule.spelling, dtype, specs=(), ties={}, coefficients={}, latest=tuple(latest)
        )
        self._scratch_folder = scratch_folder
        self._steps: list[int] = []
        # An array, because every fold multiplies all of them.
        self._shares = np.empty(0)
        self._layout = ""
        self._slots: dict[str, Slot] = {}
        self._stored: dict[str, TensorSpec] = {}
        # Means and variances by their dtypes; of the fold that has begun, the means before it.
        self._pairs: list[list[tuple[Slot, Slot]]] = []
        self._means: list[Tensor] = []
        self._storage: Storage | None = None

    @property
    def n_averaged(self) -> int:
        """How many checkpoints have been folded."""
        return len(self._steps)

    @property
    def last_step(self) -> int | None:
        """The step of the last fold, or None before the first."""
        return self._steps[-1] if self._steps else None

    @property
    def layout(self) -> str:
        """Equal for shadows with the same accumulators in the same places; empty before the first fold."""
        return self._layout

    def coefficients(self) -> dict[int, float]:
        """Step -> the part of that checkpoint in the average, in folding order; they sum to 1."""
        return dict(zip(self._steps, self._shares.tolist(), strict=True))

    @property
    def state_bytes(self) -> int:
        """What the accumulators take, in memory or in the scratch file; 0 before the first fold."""
        return size_of(self._slots)

    def next_weight(self, step: int) -> float | None:
        """What the checkpoint of `step` will weigh, or None when the rule does not count it.

        Raises:
            InvalidInputError: `step` does not go forward, or the shadow is broken.
        """
        if self.is_broken:
            raise InvalidInputError(
                "a fold into this shadow failed half-way; restore it from its last state, then fold again"
            )
        if not self.rule.counts(step):
            return None
        weight = self.rule.weight(n_averaged=self.n_averaged, step=step, prev_step=self.last_step)
        if not 0.0 <= weight <= 1.0:
            raise InvalidInputError(f"a fold's weight must be in [0, 1], not {weight!r}; the rule is wrong")
        return weight

    def check(self, source: Source) -> None:
        """Refuse a checkpoint that cannot be folded here; make room before the first one.

        Raises:
            IncompatibleError: a tensor cannot be averaged, or is not as in the first checkpoint.
            StoreUnavailableError: there is no room for the accumulators.
        """
        if self.n_averaged == 0:
            self._make_room(replace(self._about, specs=specs_of(source), ties=dict(source.ties)), source.name)
            return
        # The usual checkpoint is as the first was; only another one is looked at in full.
        is_same = source.ties == self._about.ties and self._stored == {
            name: tensor.spec for name, tensor in source.tensors.items()
        }
        if not is_same:
            self._check_other(source)

    def slots(self) -> Iterator[Slot]:
        """The accumulators, in the order of the storage."""
        yield from self._slots.values()

    def pooled_means(self) -> Iterator[str]:
        """The names of running means that are pooled with their variances."""
        yield from (mean.name for pairs in self._pairs for mean, _ in pairs)

    def begin_fold(self) -> None:
        """Until `finish_fold`, some blocks have the checkpoint and others do not: the shadow is broken."""
        self.is_broken = True
        if self.n_averaged:
            self._means = [self._gather([mean for mean, _ in pairs]) for pairs in self._pairs]

    def keep(self, begin: int, raw: Raw) -> None:
        """Put the latest bytes at byte `begin` of accumulators that are not averaged."""
        self._used_storage.save(begin, raw)

    def blend(self, begin: int, values: Tensor, *, dtype: str, weight: float) -> None:
        """Fold one block of values, float32 or float64, at byte `begin` of accumulators of `dtype`."""
        wide = values.to(getattr(torch, dtype))
        if self.n_averaged == 0 or rounds_to_one(weight, wide.dtype):
            self._used_storage.save(begin, wide.numpy().view(np.uint8))
            return
        raw = self._used_storage.load(begin, wide.numel() * wide.itemsize)
        # The lerp form has a quarter or less of the rounding error of d * shadow + (1 - d) * source.
        torch.from_numpy(raw).view(wide.dtype).lerp_(wide, weight)
        self._used_storage.save(begin, raw)

    def pool(self, means: Mapping[str, Tensor], *, weight: float) -> None:
        """Add to pooled variances what the means' distance adds: `wa_core.averaging.kernels.pool` in two halves.

        The other half is a blend like any other, so that it does not matter in which order a file has the tensors.

        Args:
            means: the checkpoint's pooled means, whole, by name.
            weight: as for `blend`.
        """
        if self.n_averaged == 0:
            return
        for pairs, old in zip(self._pairs, self._means, strict=True):
            spread = torch.cat([means[mean.name].to(old.dtype) for mean, _ in pairs]).sub_(old)
            spread.mul_(spread).mul_(weight * (1.0 - weight))
            variances = self._gather([variance for _, variance in pairs]).add_(spread)
            self._scatter([variance for _, variance in pairs], variances)

    def finish_fold(self, step: int, weight: float) -> None:
        """All blocks of the checkpoint of `step` are folded, and its variances pooled."""
        self._shares = np.append(self._shares * (1.0 - weight), weight)
        self._steps.append(step)
        self.is_broken = False

    def write_state(self, writer: Writer) -> None:
        """Write what `restore` needs: the file that `ShadowWeights.state` describes.

        Raises:
            NoAverageYetError: nothing has been folded.
        """
        tensors = [self._tensor(slot, slot.dtype) for slot in self.slots()]
        about = replace(self._about, coefficients=self.coefficients())
        self._write(writer, tensors, metadata=about.texts(), ties={})

    def write_value(self, writer: Writer, *, metadata: Mapping[str, str]) -> None:
        """Write the average in the checkpoints' dtypes.

        Raises:
            NoAverageYetError: nothing has been folded.
        """
        self._write(writer, self._value_tensors(), metadata=metadata, ties=self._about.ties)

    @classmethod
    def restore(cls, rule: Rule, source: FilesSource, *, scratch_folder: Path | None = None) -> StreamedShadow:
        """The shadow whose state `source` is; folding on gives the bits of a shadow that never stopped.

        Args:
            rule: that of the state.
            source: what `write_state` wrote; read once, and compared with its recorded digest when it has one.
            scratch_folder: as for the class.

        Raises:
            CorruptError: code `bad_shadow`, when it is not a whole state of this rule; `digest_mismatch`.
            StoreUnavailableError: it cannot be reached, or there is no room for the accumulators.
        """
        about = ShadowDescription.parse(source.metadata, rule=rule.spelling)
        if tuple(sorted(tensor.spec for tensor in source.tensors.values())) != about.stored or source.ties:
            raise bad_shadow("its tensors are not those that its description names")
        dtype: AccumulatorDtype = "float64" if about.dtype == "float64" else "float32"
        shadow = cls(rule, dtype=dtype, latest=about.latest, scratch_folder=scratch_folder)
        shadow._make_room(replace(about, coefficients={}), source.name)
        shadow._steps, shadow._shares = list(about.coefficients), np.array([*about.coefficients.values()])
        try:
            shadow._load(source)
        except BaseException:
            shadow.close()
            raise
        return shadow

    def close(self) -> None:
        """Give the accumulators' space back; the shadow is as if nothing had been folded."""
        if self._storage is not None:
            self._storage.close()
        self._storage, self._slots, self._stored, self._pairs = None, {}, {}, []
        self._steps, self._shares, self._layout, self.is_broken = [], np.empty(0), "", False
        self._about = replace(self._about, specs=(), ties={})

    @property
    def _used_storage(self) -> Storage:
        if self._storage is None:
            raise NoAverageYetError("nothing has been folded yet; fold a checkpoint that the rule counts first")
        return self._storage

    def _make_room(self, about: ShadowDescription, name: str) -> None:
        slots = slots_of(about, name)
        if self._storage is not None:  # of a first checkpoint that was refused
            self._storage.close()
        folder, end = self._scratch_folder, size_of(slots)
        self._storage = MemoryStorage(end) if folder is None else FileStorage(folder, end)
        self._slots, self._about = slots, about
        self._stored = {spec.name: spec for spec in about.specs if spec.name in slots}
        self._pairs = pairs_of(slots)
        self._layout = repr(slots)

    def _load(self, source: FilesSource) -> None:
        with reading(source) as passing:
            for stretch, raw in passing.arrivals():
                for piece, part in stretch.cut(raw):
                    self._used_storage.save(self._slots[piece.tensor.spec.name].begin + piece.begin, part)
            passing.sha256()

    def _gather(self, slots: Sequence[Slot]) -> Tensor:
        # Copied: what is loaded may be overwritten by the next load.
        raw = [self._used_storage.load(slot.begin, slot.size_bytes).copy() for slot in slots]
        return torch.from_numpy(np.concatenate(raw)).view(getattr(torch, slots[0].dtype))

    def _scatter(self, slots: Sequence[Slot], values: Tensor) -> None:
        raw, at = values.numpy().view(np.uint8), 0
        for slot in slots:
            self._used_storage.save(slot.begin, raw[at : at + slot.size_bytes])
            at += slot.size_bytes

    def _check_other(self, source: Source) -> None:
        try:
            check_spec(self._about.specs, specs_of(source))
        except IncompatibleError as error:
            raise IncompatibleError(f"{source.name}: {error.message}", code=error.code) from None
        for alias, name in self._about.ties.items():
            self._check_tie(source, source.ties.get(alias, alias), source.ties.get(name, name))

    def _check_tie(self, source: Source, alias: str, name: str) -> None:
        # A copied state dict may have lost its ties; that does no harm while the values are still the same.
        if alias == name:
            return
        for begin, size in _cut(source.tensors[name].size_bytes):
            one, other = np.empty((2, size), np.uint8)
            source.read_into(alias, begin, one.data)
            source.read_into(name, begin, other.data)
            if not np.array_equal(one, other):
                raise IncompatibleError(
                    f"{source.name}: {alias!r} and {name!r} were one tensor in the first checkpoint and differ "
                    f"now; checkpoints of one run must keep their architecture. Start a new average",
                    code="ties_changed",
                )

    def _value_tensors(self) -> list[StoredTensor]:
        return [self._tensor(slot, self._stored[slot.name].dtype) for slot in self.slots()]

    def _tensor(self, slot: Slot, dtype: str) -> StoredTensor:
        name = format_dtype_name(dtype)
        spec = TensorSpec(slot.name, dtype, self._stored[slot.name].shape)
        return StoredTensor(spec, name, slot.num_elements * DTYPE_BYTES[name])

    def _write(
        self,
        writer: Writer,
        tensors: Iterable[StoredTensor],
        *,
        metadata: Mapping[str, str],
        ties: Mapping[str, str],
    ) -> None:
        if self.is_broken or not self._steps:
            raise NoAverageYetError("nothing has been folded yet, or a fold failed half-way; there is no average")
        try:
            # Widest elements first, so that every tensor is aligned to its own element size.
            order = sorted(tensors, key=lambda tensor: (-tensor.item_bytes, tensor.spec.name))
            writer.begin(order, ties=ties, metadata=metadata)
            for tensor in order:
                self._write_tensor(writer, self._slots[tensor.spec.name], tensor)
            writer.commit(metadata)
        except BaseException:
            writer.abort()
            raise

    def _write_tensor(self, writer: Writer, slot: Slot, tensor: StoredTensor) -> None:
        into: torch.dtype = getattr(torch, tensor.spec.dtype)
        for begin, size in _cut(slot.size_bytes):
            raw = self._used_storage.load(slot.begin + begin, size)
            if tensor.spec.dtype != slot.dtype:
                values = torch.from_numpy(raw).view(getattr(torch, slot.dtype))
                raw = values.to(into).view(torch.uint8).numpy()
            writer.write(slot.name, begin // slot.item_bytes * tensor.item_bytes, raw.data)


def _cut(size_bytes: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, size_bytes, _BLOCK_BYTES):
        yield begin, min(_BLOCK_BYTES, size_bytes - begin)
