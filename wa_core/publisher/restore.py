"""What a committed checkpoint holds, fetched and verified, so that one's own training can go on from it.

It knows the two files of a checkpoint; not models or optimizers. The invariant: what is returned has the recorded
digests, and nothing in it was executed or has cost more memory than its file is large.
"""

from __future__ import annotations

import hashlib
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wa_core import layout
from wa_core.averaging.files.conversion import check_archive
from wa_core.averaging.files.foreign import unsafe_pickle
from wa_core.catalog.checkpoints import checkpoint_file
from wa_core.catalog.commit import patiently
from wa_core.errors import CorruptError, ObjectNotFoundError
from wa_core.tensors import read_checkpoint

if TYPE_CHECKING:
    from wa_core.records import CheckpointCommitted, FileRef
    from wa_core.store.base import ObjectStore

# Views that repeat values are rare in what optimizers keep, and small.
_REPEATED_BYTES_ALLOWED = 1 << 26


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint to go on from: ``model.load_state_dict(restored.weights)``.

    `weights` are under canonical names (without ``module.`` and the like). `trainer_state` is what was offered
    as such, with new tensors on the CPU; None if nothing was.
    """

    step: int
    epoch: int
    metrics: dict[str, float]
    weights: dict[str, Tensor]
    trainer_state: Any


def fetch_restored(store: ObjectStore, run_id: str, entry: CheckpointCommitted) -> Restored:
    """Read a committed checkpoint of run `run_id`.

    Raises:
        CorruptError: a file is gone, is not what was recorded or not in the run; or the training state asks for
            more than data (`unsafe_pickle`), is compressed (`compressed_archive`) or claims far more bytes than
            it has (`expanded_tensor`).
        TransientError: the store stayed away.
    """
    model = checkpoint_file(run_id, entry)
    weights = patiently(
        lambda: read_checkpoint(_stream(store, model), size_bytes=model.size_bytes, sha256=model.sha256)
    )
    state = None
    if layout.TRAINER_FILE in entry.files:
        state = fetch_trainer_state(store, checkpoint_file(run_id, entry, layout.TRAINER_FILE))
    return Restored(entry.step, entry.epoch, dict(entry.metrics), weights.tensors, state)


def fetch_trainer_state(store: ObjectStore, ref: FileRef) -> Any:  # noqa: ANN401  whatever was offered
    """Read a `trainer.pt`, by way of a temporary file; errors as `fetch_restored` says."""
    with tempfile.TemporaryDirectory(prefix="wa-restore-") as folder:
        path = Path(folder) / layout.TRAINER_FILE
        patiently(lambda: _download(store, ref, path))
        return load_trainer_state(path)


def load_trainer_state(path: Path) -> Any:  # noqa: ANN401  whatever was offered
    """Read a `trainer.pt` whose digest has been verified; errors as `fetch_restored` says."""
    check_archive(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise unsafe_pickle(str(error)) from None
    tensors = {id(tensor): tensor for tensor in _tensors(state)}.values()
    claimed, size_bytes = sum(tensor.nbytes for tensor in tensors), path.stat().st_size
    if claimed > 4 * size_bytes + _REPEATED_BYTES_ALLOWED:
        raise CorruptError(
            f"the tensors of {path.name} claim {claimed} bytes, but it has {size_bytes}: they are views that "
            "repeat the same values; save contiguous tensors",
            code="expanded_tensor",
        )
    return state


def _stream(store: ObjectStore, ref: FileRef) -> Iterator[bytes]:
    try:
        return store.stream(ref.key)
    except ObjectNotFoundError:
        raise CorruptError(
            f"{ref.key} is recorded but absent from the bucket; restore it from a backup", code="object_missing"
        ) from None


def _download(store: ObjectStore, ref: FileRef, path: Path) -> None:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in _stream(store, ref):
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != ref.sha256:
        raise CorruptError(
            f"{ref.key} has sha256 {digest.hexdigest()}, but {ref.sha256} was recorded; restore it from a backup",
            code="digest_mismatch",
        )


def _tensors(state: object) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)
