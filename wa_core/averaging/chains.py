"""Neighbouring tensors of a checkpoint that are neighbours in the accumulators too: they are folded as one.

A small network has hundreds of tensors of a few elements; folding them one by one would cost more than the
arithmetic. It knows where tensors lie in files and in shadows; it moves no data. The invariant: the chains of a
file cover its data once and in order, and an element's place in a chain is its place in every target of the chain.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from wa_core.averaging.tensor_policy import Policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from wa_core.averaging.files.sources import FilesSource
    from wa_core.averaging.files.stored import StoredTensor, Stretch
    from wa_core.averaging.streamed_shadow import StreamedShadow


@dataclass(frozen=True, slots=True)
class Target:
    """Where a chain goes in some shadows of one layout: at byte `begin`, blended in or as the latest value."""

    shadows: Sequence[StreamedShadow]
    begin: int
    dtype: str
    item_bytes: int
    is_latest: bool


@dataclass(frozen=True, slots=True)
class Chain:
    """Tensors of one dtype that follow each other in a file, and where they go."""

    tensors: list[StoredTensor]
    targets: list[Target]

    @property
    def dtype(self) -> torch.dtype:
        """Of the checkpoint's tensors."""
        dtype: torch.dtype = getattr(torch, self.tensors[0].spec.dtype)
        return dtype

    @property
    def item_bytes(self) -> int:
        """Of one element in the file."""
        return self.tensors[0].item_bytes

    @property
    def begin(self) -> int:
        """The first byte in the file."""
        return self.tensors[0].begin

    @property
    def end(self) -> int:
        """The byte after the last one."""
        return self.tensors[-1].begin + self.tensors[-1].size_bytes

    def find(self, element: int) -> tuple[str, int]:
        """The tensor that an element of the chain belongs to, and which of its elements it is."""
        place = self.begin + element * self.item_bytes
        tensor = next(tensor for tensor in self.tensors if place < tensor.begin + tensor.size_bytes)
        return tensor.spec.name, (place - tensor.begin) // self.item_bytes

    def takes(self, tensor: StoredTensor, targets: list[Target]) -> bool:
        """Whether `tensor`, which goes to `targets`, begins where the chain ends, in the file and all targets."""
        first, offset = self.tensors[0], (tensor.begin - self.begin) // self.item_bytes
        return (
            (tensor.file, tensor.dtype, tensor.begin) == (first.file, first.dtype, self.end)
            and len(targets) == len(self.targets)
            and all(
                one.shadows is other.shadows
                and one.dtype == other.dtype
                and one.is_latest == other.is_latest
                and one.begin + offset * one.item_bytes == other.begin
                for one, other in zip(self.targets, targets, strict=True)
            )
        )


def plan_chains(source: FilesSource, shadows: Iterable[StreamedShadow]) -> dict[int, list[Chain]]:
    """The chains of every file of `source`, in file order.

    Args:
        source: the checkpoint.
        shadows: those that count it.
    """
    alike: dict[str, list[StreamedShadow]] = {}
    for shadow in shadows:
        alike.setdefault(shadow.layout, []).append(shadow)
    targets: dict[str, list[Target]] = {name: [] for name in source.tensors}
    for group in alike.values():
        for slot in group[0].slots():
            is_latest = slot.policy is Policy.LATEST
            target = Target(group, slot.begin, slot.dtype, slot.item_bytes, is_latest)
            targets[source.ties.get(slot.name, slot.name)].append(target)
    found: dict[int, list[Chain]] = {}
    for name, tensor in source.tensors.items():
        chains = found.setdefault(tensor.file, [])
        if chains and chains[-1].takes(tensor, targets[name]):
            chains[-1].tensors.append(tensor)
        elif tensor.size_bytes:
            chains.append(Chain([tensor], targets[name]))
    return found


def parts_of(chains: list[Chain], stretch: Stretch) -> Iterator[tuple[Chain, int, int]]:
    """What of each chain lies in a stretch: the chain, its first byte and the byte after the last in the file."""
    begin = stretch.begin
    for number in range(bisect_right(chains, begin, key=lambda chain: chain.begin) - 1, len(chains)):
        chain = chains[number]
        end = min(chain.end, stretch.end)
        if begin >= end:
            return
        yield chain, begin, end
        begin = end
