"""What an average is made of while it is followed: accumulators for rules that fold, a list for windows.

Both answer the same few questions, so that the rest of the averager does not ask which it is. They know tensors,
files and rules; not generations or cursors. The invariant: `write_value` gives the average of exactly the
checkpoints in `coefficients`, or raises.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Protocol

from services.averager.checkpoints import open_checkpoint, open_file
from wa_core.averaging.files.bytes_writer import BytesWriter
from wa_core.averaging.files.offline import MergeOptions, average_files
from wa_core.averaging.files.output import SafetensorsWriter
from wa_core.averaging.files.sources import specs_of
from wa_core.averaging.slots import accumulator_bytes
from wa_core.averaging.streamed_shadow import StreamedShadow
from wa_core.errors import IncompatibleError, NoAverageYetError
from wa_core.specs import check_spec

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from services.averager.scratch import Scratch
    from wa_core.averaging.files.blocks import AccumulatorDtype
    from wa_core.averaging.files.sources import FilesSource, Source
    from wa_core.averaging.rules import Rule
    from wa_core.averaging.windows import WindowRule
    from wa_core.records import AverageManifest, CheckpointCommitted
    from wa_core.specs import TensorSpec
    from wa_core.store.base import ObjectStore

# States up to this size are written in memory; larger ones go through a file.
_SMALL_BYTES = 4 << 20


class Accumulation(Protocol):
    """One average in the making."""

    @property
    def shadow(self) -> StreamedShadow | None:
        """What checkpoints are folded into; None when they are only remembered."""
        ...

    def restore(self, manifest: AverageManifest | None) -> None:
        """Go to the state of a generation, or to the beginning.

        Raises:
            CorruptError: what was kept of the generation cannot be read.
            TransientError: the store is away.
        """
        ...

    def prepare(self, source: Source, *, taken: Sequence[CheckpointCommitted]) -> None:
        """Refuse a checkpoint that does not fit those `taken` before; make room before the first one.

        Raises:
            IncompatibleError: how it differs.
            StoreUnavailableError: there is no room.
        """
        ...

    def after(
        self, entry: CheckpointCommitted, *, taken: Sequence[CheckpointCommitted]
    ) -> tuple[list[int], dict[int, float]]:
        """Log seqs and coefficients once `entry` has joined those `taken` before; after it was folded."""
        ...

    def write_state(self, folder: Path) -> bytes | Path | None:
        """What `restore` needs, as bytes or as a file in `folder`; None when the manifest is enough."""
        ...

    def write_value(self, path: Path, *, taken: Sequence[CheckpointCommitted]) -> None:
        """Write the average of the checkpoints `taken` in their own dtypes, as safetensors."""
        ...

    def close(self) -> None:
        """Give memory and files back."""
        ...


class FoldedAccumulation:
    """Of a rule that weighs each checkpoint by one number (SWA, EMA, power EMA): accumulators.

    Args:
        store: where states are kept.
        rule: how much each checkpoint counts.
        dtype: what is accumulated in.
        scratch: where accumulators go that memory has no room for.
    """

    def __init__(self, store: ObjectStore, rule: Rule, *, dtype: AccumulatorDtype, scratch: Scratch) -> None:
        self._store = store
        self._rule = rule
        self._dtype = dtype
        self._scratch = scratch
        self._shadow = StreamedShadow(rule, dtype=dtype)

    @property
    def shadow(self) -> StreamedShadow:
        """The accumulators."""
        return self._shadow

    def restore(self, manifest: AverageManifest | None) -> None:
        """Read the generation's accumulators back, or start afresh."""
        self.close()
        self._shadow = StreamedShadow(self._rule, dtype=self._dtype)
        if manifest is None or manifest.shadow is None:
            return
        with closing(open_file(self._store, manifest.shadow)) as source:
            self.adopt(source)

    def adopt(self, source: FilesSource) -> None:
        """Go on from a state that was written elsewhere.

        Raises:
            CorruptError: it is no state of this rule.
        """
        folder = self._scratch.place(self, source.size_bytes)
        self._shadow = StreamedShadow.restore(self._rule, source, scratch_folder=folder)

    def prepare(self, source: Source, *, taken: Sequence[CheckpointCommitted]) -> None:  # noqa: ARG002  the port's
        """Compare with the first checkpoint; before it, choose where the accumulators go."""
        if self._shadow.n_averaged == 0:
            self._shadow.close()
            folder = self._scratch.place(self, accumulator_bytes(source, self._dtype))
            self._shadow = StreamedShadow(self._rule, dtype=self._dtype, scratch_folder=folder)
        self._shadow.check(source)

    def after(
        self, entry: CheckpointCommitted, *, taken: Sequence[CheckpointCommitted]
    ) -> tuple[list[int], dict[int, float]]:
        """All so far, and this one."""
        return [*(known.seq for known in taken), entry.seq], self._shadow.coefficients()

    def write_state(self, folder: Path) -> bytes | Path | None:
        """The accumulators."""
        if self._shadow.state_bytes <= _SMALL_BYTES:
            writer = BytesWriter()
            self._shadow.write_state(writer)
            return writer.body
        path = folder / "state.safetensors"
        self._shadow.write_state(SafetensorsWriter(path))
        return path

    def write_value(self, path: Path, *, taken: Sequence[CheckpointCommitted]) -> None:  # noqa: ARG002  the port's
        """The accumulators, rounded once."""
        self._shadow.write_value(SafetensorsWriter(path), metadata={"format": "pt"})

    def close(self) -> None:
        """Let go of the accumulators."""
        self._shadow.close()
        self._scratch.release(self)


class WindowAccumulation:
    """Of a window: which checkpoints are in it. Its mean is made from the checkpoints themselves, when wanted.

    Args:
        store: where the checkpoints are.
        run_id: whose they are.
        rule: which checkpoints are in the window, and how much each counts.
        dtype: what is summed in.
    """

    shadow = None

    def __init__(self, store: ObjectStore, run_id: str, rule: WindowRule, *, dtype: AccumulatorDtype) -> None:
        self._store = store
        self._run_id = run_id
        self._rule = rule
        self._dtype = dtype
        self._specs: tuple[TensorSpec, ...] | None = None
        self._offered: tuple[TensorSpec, ...] | None = None

    def restore(self, manifest: AverageManifest | None) -> None:  # noqa: ARG002  the port's signature
        """Forget: the manifest says which checkpoints are in the window."""
        self._specs = self._offered = None

    def prepare(self, source: Source, *, taken: Sequence[CheckpointCommitted]) -> None:
        """Compare with the newest checkpoint in the window."""
        self._offered = specs_of(source)
        if not taken:
            return
        if self._specs is None:
            with closing(open_checkpoint(self._store, self._run_id, taken[-1])) as newest:
                self._specs = specs_of(newest)
        try:
            check_spec(self._specs, self._offered)
        except IncompatibleError as error:
            raise IncompatibleError(f"{source.name}: {error.message}", code=error.code) from None

    def after(
        self, entry: CheckpointCommitted, *, taken: Sequence[CheckpointCommitted]
    ) -> tuple[list[int], dict[int, float]]:
        """Those that are in the window now."""
        self._specs = self._offered
        seqs = {known.step: known.seq for known in (*taken, entry)}
        coefficients = self._rule.coefficients(list(seqs))
        return [seqs[step] for step in coefficients], coefficients

    def write_state(self, folder: Path) -> bytes | Path | None:  # noqa: ARG002  the port's signature
        """Nothing more than the manifest."""
        return None

    def write_value(self, path: Path, *, taken: Sequence[CheckpointCommitted]) -> None:
        """The mean of the checkpoints in the window, tile by tile."""
        if not taken:
            raise NoAverageYetError("no checkpoint is in the window yet")
        with ExitStack() as stack:
            sources = [
                stack.enter_context(closing(open_checkpoint(self._store, self._run_id, entry))) for entry in taken
            ]
            steps = [entry.step for entry in taken]
            options = MergeOptions(accumulator_dtype=self._dtype, num_threads=1)
            average_files(sources, self._rule, SafetensorsWriter(path), steps=steps, options=options)

    def close(self) -> None:
        """Nothing to give back."""
