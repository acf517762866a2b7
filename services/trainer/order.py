"""Which samples a step trains on, and the randomness it uses: functions of seed, step and rank alone.

Nothing is carried from step to step, so a resumed run needs no sampler or generator state to go on exactly
as an undisturbed one. Every epoch is a permutation of the data and drops its last incomplete batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from services.recipes.registry import steps_per_epoch
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor


def derived_seed(seed: int, *parts: object) -> int:
    """A 63-bit seed for one purpose, independent of those for other `parts`."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def seed_step(seed: int, *, step: int, rank: int) -> torch.Generator:
    """Seed torch for one step of one rank, and return the generator for its augmentation."""
    torch.manual_seed(derived_seed(seed, "model", step, rank))
    return torch.Generator().manual_seed(derived_seed(seed, "augment", step, rank))


@dataclass(frozen=True, slots=True)
class DataOrder:
    """The order of `num_samples` samples in batches of `batch_size` over all workers together."""

    seed: int
    num_samples: int
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass over the data; one when the data are fewer than a batch."""
        return steps_per_epoch(self.num_samples, batch_size=self.batch_size)

    def batch(self, step: int) -> Tensor:
        """The sample indices of step `step` (from 0) over all workers: int64, shape (batch,)."""
        epoch, number = divmod(step, self.steps_per_epoch)
        order = _permutation(self.num_samples, seed=derived_seed(self.seed, "order", epoch))
        return order[number * self.batch_size : (number + 1) * self.batch_size]

    def share(self, step: int, *, rank: int, world_size: int) -> tuple[Tensor, float]:
        """The indices of one rank's part of a batch, and that part's weight in the mean over ranks.

        The weight is 1 when the batch divides evenly; it keeps the mean gradient that of the global batch
        when it does not.

        Raises:
            InvalidInputError: there are more workers than samples in a batch.
        """
        whole = self.batch(step)
        if len(whole) < world_size:
            raise InvalidInputError(
                f"a batch of {len(whole)} samples cannot be shared by {world_size} workers; use a batch_size of "
                f"{world_size} or more, or fewer workers"
            )
        part = torch.tensor_split(whole, world_size)[rank]
        return part, len(part) * world_size / len(whole)


@lru_cache(maxsize=1)
def _permutation(num_samples: int, *, seed: int) -> Tensor:
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
