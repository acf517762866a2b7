"""What a training state is, how it becomes a checkpoint's `trainer.pt`, and how it comes back.

The weights are in `model.safetensors`, for everybody; `trainer.pt` holds what only resuming needs. It is read
with ``weights_only=True`` after its digest was verified, so nothing in it is ever executed. There is no state of
random generators or samplers: those derive from seed and step (`services.trainer.order`).
"""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING, Any

import torch

from wa_core import layout
from wa_core.catalog.commit import patiently
from wa_core.errors import CorruptError, ObjectNotFoundError
from wa_core.specs import check_spec
from wa_core.tensors import canonical_state_dict, read_checkpoint, spec_of

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from wa_core.records import CheckpointCommitted, FileRef
    from wa_core.store.base import ObjectStore


def trainer_state(optimizer: Optimizer, scheduler: LRScheduler | None, *, step: int) -> dict[str, Any]:
    """What resuming after `step` needs besides the weights."""
    return {
        "step": step,
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict() if scheduler else None,
    }


def restore(
    store: ObjectStore,
    checkpoint: CheckpointCommitted,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
) -> int:
    """Load a committed checkpoint, and return the number of steps that it has behind it.

    Raises:
        CorruptError: a file is missing or is not what was recorded.
        IncompatibleError: the recipe builds another model than the one that was saved.
        TransientError: the store stayed away.
    """
    _load_weights(model, fetch_verified(store, checkpoint, layout.MODEL_FILE))
    body = fetch_verified(store, checkpoint, layout.TRAINER_FILE)
    state = torch.load(io.BytesIO(body), weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    return checkpoint.step


def _load_weights(model: nn.Module, body: bytes) -> None:
    targets = canonical_state_dict(model.state_dict())
    weights = read_checkpoint([body]).tensors
    check_spec(spec_of(targets), spec_of(weights))
    for name, target in targets.items():
        target.copy_(weights[name])


def fetch_verified(store: ObjectStore, checkpoint: CheckpointCommitted, name: str) -> bytes:
    """Read a checkpoint's file, whole, and check its digest.

    Raises:
        CorruptError: the file is not part of the checkpoint, is gone, or its bytes are not what was recorded.
    """
    ref: FileRef | None = checkpoint.files.get(name)
    if ref is None:
        raise CorruptError(
            f"the checkpoint of step {checkpoint.step} (log entry {checkpoint.seq}) has no {name}, so training "
            f"cannot resume from it; it holds {', '.join(sorted(checkpoint.files)) or 'nothing'}"
        )
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
