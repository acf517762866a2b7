"""What users download: averaged weights with recalibrated BatchNorm buffers, as safetensors and as `.pt`.

Both files are written in one pass over the value that the averager made, with the buffers put in place of its own;
a model is never in memory. The invariant: of what the assess process hands back, only finite normalisation
statistics that the average has, of the same shape and type, come into a served file; a weight never does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from wa_core import layout
from wa_core.averaging.files.archive import write_archive
from wa_core.averaging.files.blocks import is_finite
from wa_core.averaging.files.output import SafetensorsWriter
from wa_core.averaging.files.sources import open_source
from wa_core.errors import WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from wa_core.averaging.files.sources import FilesSource
    from wa_core.averaging.files.stored import StoredTensor
    from wa_core.records import AverageManifest, BatchNormSummary

_BLOCK_BYTES = 1 << 20
_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})


@dataclass(frozen=True, slots=True)
class Buffers:
    """Recalibrated buffers, as raw bytes by the name under which the average stores them."""

    by_name: Mapping[str, bytes]

    @classmethod
    def read(cls, path: Path, value: FilesSource) -> Buffers | str:
        """The buffers in `path` for the average in `value`, or why they cannot be served."""
        try:
            source = open_source(path)
        except WeightAveragingError as error:
            return f"the assess process returned no buffers that can be read ({error.message})"
        try:
            found: dict[str, bytes] = {}
            for name, tensor in source.tensors.items():
                stored = value.ties.get(name, name)
                have = value.tensors.get(stored)
                is_statistic = name.rpartition(".")[2] in _STATISTICS
                if have is None or not is_statistic or _kind(have) != _kind(tensor):
                    return f"the assess process returned {name!r}, which is no BatchNorm buffer of this average"
                raw = np.empty(tensor.size_bytes, np.uint8)
                source.read_into(name, 0, raw.data)
                if not is_finite(raw, tensor.dtype):
                    return f"recalibration gave values in {name!r} that are not finite"
                found[stored] = raw.tobytes()
            return cls(found)
        finally:
            source.close()


@dataclass(frozen=True, slots=True)
class ServedWeights:
    """The value of an average with buffers in place of its own."""

    value: FilesSource
    buffers: Buffers

    def write_safetensors(self, path: Path, *, metadata: Mapping[str, str], on_block: Callable[[], None]) -> None:
        """Write one file; every alias of a tied tensor is a full copy, for plain readers know nothing of ties.

        Raises:
            InvalidInputError: it cannot be written (`output_not_writable`).
        """
        value, writer = self.value, SafetensorsWriter(path)
        aliases = [_renamed(value.tensors[name], alias) for alias, name in value.ties.items()]
        # Widest elements first, so that every tensor is aligned to its own element size.
        order = sorted([*value.tensors.values(), *aliases], key=lambda one: (-one.item_bytes, one.spec.name))
        try:
            writer.begin(order, ties={}, metadata=metadata)
            for tensor in order:
                begin = 0
                for block in self._blocks(tensor):
                    on_block()
                    writer.write(tensor.spec.name, begin, block)
                    begin += len(block)
            writer.commit(metadata)
        except BaseException:
            writer.abort()
            raise

    def write_archive(self, path: Path, *, on_block: Callable[[], None]) -> None:
        """Write a file of `torch.save`; tied tensors share memory in it.

        Raises:
            InvalidInputError: as for `write_safetensors`.
        """

        def blocks(tensor: StoredTensor) -> Iterator[memoryview]:
            for block in self._blocks(tensor):
                on_block()
                yield block

        write_archive(path, [*self.value.tensors.values()], ties=self.value.ties, blocks=blocks)

    def _blocks(self, tensor: StoredTensor) -> Iterator[memoryview]:
        stored = self.value.ties.get(tensor.spec.name, tensor.spec.name)
        if stored in self.buffers.by_name:
            yield memoryview(self.buffers.by_name[stored])
            return
        buffer = memoryview(bytearray(min(_BLOCK_BYTES, tensor.size_bytes)))
        for begin in range(0, tensor.size_bytes, _BLOCK_BYTES):
            block = buffer[: min(_BLOCK_BYTES, tensor.size_bytes - begin)]
            self.value.read_into(stored, begin, block)
            yield block


def provenance(
    manifest: AverageManifest, batchnorm: BatchNormSummary, *, checkpoints: Mapping[int, str]
) -> dict[str, str]:
    """What a served file says of itself in its safetensors metadata.

    Args:
        manifest: the generation that it is of.
        batchnorm: what recalibration did.
        checkpoints: step -> SHA-256 of the weights of that checkpoint, where known.
    """
    sources = [
        {"step": step, "coefficient": part}
        | ({"sha256": {layout.MODEL_FILE: checkpoints[step]}} if step in checkpoints else {})
        for step, part in manifest.coefficients.items()
    ]
    return {
        "format": "pt",
        "weights": "averaged",
        "run_id": manifest.run_id,
        "average": manifest.name,
        "generation": str(manifest.generation),
        "rule": manifest.rule,
        "n_averaged": str(manifest.n_averaged),
        "first_step": str(manifest.first_step),
        "last_step": str(manifest.last_step),
        "coefficients": json.dumps(list(manifest.coefficients.items())),
        "sources": json.dumps(sources, separators=(",", ":")),
        "batchnorm": batchnorm.status,
    }


def _kind(tensor: StoredTensor) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tensor.spec.shape


def _renamed(tensor: StoredTensor, name: str) -> StoredTensor:
    return replace(tensor, spec=replace(tensor.spec, name=name))
