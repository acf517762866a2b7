"""What a training state is, how it becomes a checkpoint's `trainer.pt`, and how it comes back.

The weights are in `model.safetensors`, for everybody; `trainer.pt` holds what only resuming needs. It is read
with ``weights_only=True`` after its digest was verified, so nothing in it is ever executed. There is no state of
random generators or samplers: those derive from seed and step (`services.trainer.order`).
"""

from __future__ import annotations

import hashlib
import io
import pickle
from typing import TYPE_CHECKING, Any, Protocol

import torch

from wa_core import layout
from wa_core.averaging.files.foreign import unsafe_pickle
from wa_core.catalog.checkpoints import checkpoint_file
from wa_core.catalog.commit import patiently
from wa_core.errors import CorruptError, ObjectNotFoundError
from wa_core.specs import check_spec
from wa_core.tensors import canonical_state_dict, read_checkpoint, spec_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from wa_core.records import CheckpointCommitted, FileRef
    from wa_core.store.base import ObjectStore


class Resumable(Protocol):
    """A part of training that has a state: the optimizer, a scheduler, the scaler of float16."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Go on from there."""
        ...


def trainer_state(parts: Mapping[str, Resumable | None], *, step: int) -> dict[str, Any]:
    """What resuming after `step` needs besides the weights: the state of each part that there is."""
    return {"step": step} | {name: part.state_dict() if part else None for name, part in parts.items()}


def restore(
    store: ObjectStore,
    checkpoint: CheckpointCommitted,
    *,
    run_id: str,
    model: nn.Module,
    parts: Mapping[str, Resumable | None],
) -> int:
    """Load a committed checkpoint of run `run_id`, and return the number of steps that it has behind it.

    A part that the checkpoint knows nothing of stays as it is: an older version wrote it.

    Raises:
        CorruptError: a file is missing, is not what was recorded or is not in the run; or the training state is a
            pickle that asks for more than data (`unsafe_pickle`; nothing of it is run).
        IncompatibleError: the recipe builds another model than the one that was saved.
        TransientError: the store stayed away.
    """
    weights, training = (
        fetch_verified(store, checkpoint_file(run_id, checkpoint, name))
        for name in (layout.MODEL_FILE, layout.TRAINER_FILE)
    )
    _load_weights(model, weights)
    state = _unpickled(training, step=checkpoint.step)
    for name, part in parts.items():
        if part is not None and state.get(name):
            part.load_state_dict(state[name])
    return checkpoint.step


def _load_weights(model: nn.Module, body: bytes) -> None:
    targets = canonical_state_dict(model.state_dict())
    weights = read_checkpoint([body]).tensors
    check_spec(spec_of(targets), spec_of(weights))
    for name, target in targets.items():
        target.copy_(weights[name])


def _unpickled(body: bytes, *, step: int) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(body), weights_only=True)
    except pickle.UnpicklingError as error:
        refusal = unsafe_pickle(str(error))
        raise CorruptError(f"{layout.TRAINER_FILE} of step {step}: {refusal.message}", code=refusal.code) from None
    return state


def fetch_verified(store: ObjectStore, ref: FileRef) -> bytes:
    """Read a recorded file, whole, and check its digest.

    Raises:
        CorruptError: the file is gone, or its bytes are not what was recorded.
    """
    try:
        body = patiently(lambda: store.get(ref.key))
    except ObjectNotFoundError:
        raise CorruptError(
            f"{ref.key} is recorded but absent from the bucket; restore it from a backup", code="object_missing"
        ) from None
    if (digest := hashlib.sha256(body).hexdigest()) != ref.sha256:
        raise CorruptError(
            f"{ref.key} has sha256 {digest}, but {ref.sha256} was recorded; restore it from a backup"
        )
    return body
