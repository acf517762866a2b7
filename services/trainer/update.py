"""One step of the optimizer on one rank: gradients of its part of the batch, summed, clipped and applied.

It knows no order of data and no checkpoints. The invariant: the gradient is that of the mean loss over the global
batch, in however many parts and on however many ranks it is computed.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch.optim import Optimizer

    from wa_core.recipe import Batch, Recipe
    from wa_core.records import TrainingOptions

_DTYPES = {"bf16": torch.bfloat16, "float16": torch.float16}


class Update:
    """Computes and applies gradients as a run's training options say.

    Args:
        options: the run's.
        recipe: whose loss it is.
        optimizer: of the model's parameters, which are float32 whatever `options.precision` says.
        device: the torch device that the model is on.
    """

    def __init__(self, options: TrainingOptions, recipe: Recipe, optimizer: Optimizer, *, device: str) -> None:
        self._options = options
        self._recipe = recipe
        self._optimizer = optimizer
        self._device_type = torch.device(device).type
        # Gradients of float16 vanish unless they are scaled up; the other precisions have float32's range.
        self.scaler = torch.amp.GradScaler(self._device_type, enabled=options.precision == "float16")

    def add_gradients(
        self, replica: nn.Module, indices: Tensor, *, weight: float, batch_of: Callable[[Tensor], Batch]
    ) -> float:
        """Sum up the gradients of this rank's samples, and return their mean loss times `weight`.

        Args:
            replica: the model, or the DDP module around it; ranks exchange gradients once, with the last part.
            indices: the samples, int64 of shape (n,).
            weight: of this rank's mean loss in the mean over ranks.
            batch_of: fetches a part's samples.

        Raises:
            InvalidInputError: there are fewer samples than parts.
        """
        parts = _parts(indices, self._options.accumulate_batches)
        self._optimizer.zero_grad(set_to_none=True)
        losses = []
        for number, part in enumerate(parts, 1):
            with _together(replica, is_last=number == len(parts)):
                with self._autocast():
                    loss = self._recipe.loss(replica, batch_of(part)) * (weight * len(part) / len(indices))
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            losses.append(loss.detach())
        return float(torch.stack(losses).sum())

    def apply(self) -> dict[str, float]:
        """Clip the gradients if asked to, and step; returns their norm before that, if it was looked at.

        A step of float16 whose gradients have overflowed changes no weight, on no rank, and halves the scale.
        """
        found = {}
        if self._options.clip_norm is not None:
            self.scaler.unscale_(self._optimizer)
            parameters = [each for group in self._optimizer.param_groups for each in group["params"]]
            found["grad_norm"] = float(nn.utils.clip_grad_norm_(parameters, self._options.clip_norm))
        self.scaler.step(self._optimizer)
        self.scaler.update()
        return found

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._options.precision == "float32":
            return nullcontext()
        return torch.autocast(self._device_type, dtype=_DTYPES[self._options.precision])


def _parts(indices: Tensor, num_parts: int) -> tuple[Tensor, ...]:
    if len(indices) < num_parts:
        raise InvalidInputError(
            f"a worker's {len(indices)} samples of a step cannot be cut into {num_parts} parts; use a larger "
            f"batch_size, fewer workers or a smaller accumulate_batches"
        )
    return torch.tensor_split(indices, num_parts)


def _together(replica: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
    if isinstance(replica, nn.parallel.DistributedDataParallel) and not is_last:
        return replica.no_sync()
    return nullcontext()
