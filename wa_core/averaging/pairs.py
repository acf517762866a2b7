"""Running means and variances that belong together, held until both are there.

In a file the two tensors of a pair lie apart, and the fold of the variance needs the means. It knows blocks of
tensors and where pairs go; no files and no rules. The invariant: a pair is folded once into every shadow that
pools it, whole, when its last block arrives, whatever the order; it is let go then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from wa_core.averaging.streamed import Slot, StreamedShadow


@dataclass(frozen=True, slots=True)
class PairTarget:
    """Where a pair goes in one shadow; `slot` is the means'.

    `means` and `variances` are what the checkpoint stores them as.
    """

    shadow: StreamedShadow
    slot: Slot
    weight: float
    means: str
    variances: str


class Pairs:
    """The pairs of one checkpoint.

    Args:
        targets: where they go.
        sizes: elements of every tensor of the checkpoint, by name.
    """

    def __init__(self, targets: Sequence[PairTarget], *, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._waiting: dict[str, list[PairTarget]] = {}
        for target in targets:
            for name in {target.means, target.variances}:
                self._waiting.setdefault(name, []).append(target)
        self._held: dict[str, Tensor] = {}
        self._num_arrived = dict.fromkeys(self._waiting, 0)

    def take(self, name: str, begin: int, values: Tensor) -> None:
        """Take in a block of a tensor, from element `begin` on; tensors of no pair are ignored."""
        if name not in self._waiting:
            return
        if name not in self._held:
            self._held[name] = torch.empty(self._sizes[name], dtype=values.dtype)
        self._held[name][begin : begin + len(values)] = values
        self._num_arrived[name] += len(values)
        if self._num_arrived[name] == self._sizes[name]:
            self._fold(name)

    def _fold(self, name: str) -> None:
        for target in list(self._waiting[name]):
            pair = (target.means, target.variances)
            if all(self._num_arrived[one] == self._sizes[one] for one in pair):
                means, variances = (self._held[one] for one in pair)
                target.shadow.pool(target.slot, means, variances, weight=target.weight)
                for one in {*pair}:
                    self._waiting[one].remove(target)
        for done in [one for one in self._held if not self._waiting[one]]:
            del self._held[done]
