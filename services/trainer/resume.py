"""What a training state is, how it becomes a checkpoint's `trainer.pt`, and how it comes back.

The weights are in `model.safetensors`, for everybody; `trainer.pt` holds what only resuming needs. It is read
with ``weights_only=True`` after its digest was verified, so nothing in it is ever executed. There is no state of
random generators or samplers: those derive from seed and step (`services.trainer.order`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from services.trainer.failure import SPOILED
from wa_core import layout
from wa_core.catalog.checkpoints import checkpoint_file
from wa_core.errors import CorruptError
from wa_core.publisher.restore import fetch_restored
from wa_core.specs import check_spec
from wa_core.tensors import canonical_state_dict, spec_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from wa_core.publisher import Restored
    from wa_core.records import CheckpointCommitted
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
            pickle that asks for more than data (`unsafe_pickle`; nothing of it is run). Its code is one of
            `SPOILED`, unless the record itself is at fault.
        IncompatibleError: the recipe builds another model than the one that was saved.
        TransientError: the store stayed away.
    """
    restored = _fetched(store, checkpoint, run_id=run_id)
    _load_weights(model, restored.weights)
    for name, part in parts.items():
        if part is not None and restored.trainer_state.get(name):
            part.load_state_dict(restored.trainer_state[name])
    return checkpoint.step


def _fetched(store: ObjectStore, checkpoint: CheckpointCommitted, *, run_id: str) -> Restored:
    checkpoint_file(run_id, checkpoint, layout.TRAINER_FILE)  # must be there: a run of one's own may do without
    try:
        return fetch_restored(store, run_id, checkpoint)
    except CorruptError as error:
        # Whatever is wrong with a file, the runner tries the checkpoint before this one.
        raise CorruptError(
            f"the checkpoint of step {checkpoint.step}: {error.message}",
            code=error.code if error.code in SPOILED else "corrupt",
        ) from None


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    targets = canonical_state_dict(model.state_dict())
    check_spec(spec_of(targets), spec_of(weights))
    for name, target in targets.items():
        target.copy_(weights[name])
