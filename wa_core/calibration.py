"""Running a model over calibration data, whatever a data loader yields.

It knows batches (tensors, tuples, lists, named tuples, mappings) and devices; it does not know what the pass is
for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    Forward = Callable[[nn.Module, Any], object]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one pass went through; `is_complete` is False when it was stopped before the data ended."""

    num_batches: int
    num_samples: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class CalibrationLoop:
    """A model, its data, and how it takes them.

    Attributes:
        model: what runs.
        batches: inputs; tuples and lists count by their first element, mappings as keyword arguments.
        forward: called as ``forward(model, batch)`` instead, unless None.
        device: where each batch is moved first, unless None.
    """

    model: nn.Module
    batches: Iterable[Any]
    forward: Forward | None = None
    device: torch.device | str | None = None

    def run(self, *, is_enough: Callable[[], bool]) -> Seen:
        """Run batch after batch until `is_enough`, asked after each, or until the data end."""
        forward = self.forward or _default_forward
        num_batches = num_samples = 0
        for batch in self.batches:
            forward(self.model, batch if self.device is None else _move(batch, self.device))
            num_batches += 1
            num_samples += count_samples(batch)
            if is_enough():
                return Seen(num_batches, num_samples, is_complete=False)
        return Seen(num_batches, num_samples, is_complete=True)


def _default_forward(model: nn.Module, batch: Any) -> object:  # noqa: ANN401 - whatever a data loader yields
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _move(batch: Any, device: torch.device | str) -> Any:  # noqa: ANN401 - as above
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [_move(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def count_samples(batch: Any) -> int:  # noqa: ANN401 - as above
    """The length of the first tensor in a batch; 0 where there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return next((found for part in parts if (found := count_samples(part))), 0)
