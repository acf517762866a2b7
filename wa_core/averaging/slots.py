"""Where the accumulators of a streamed average lie in its storage, one slot each.

It knows specs and policies, not what is in the storage. The order is a function of the checkpoints' specs alone,
so that shadows of the same model have the same layout, and every slot is aligned to its own element size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wa_core.averaging.files.sources import specs_of
from wa_core.averaging.snapshot import ShadowDescription
from wa_core.averaging.tensor_policy import Policy, partner_of
from wa_core.errors import IncompatibleError
from wa_core.header import DTYPE_BYTES
from wa_core.specs import format_dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from wa_core.averaging.files.blocks import AccumulatorDtype
    from wa_core.averaging.files.sources import Source


@dataclass(frozen=True, slots=True)
class Slot:
    """One accumulator: `dtype` is torch's name of what it holds; it begins at byte `begin` of the storage."""

    name: str
    dtype: str
    policy: Policy
    item_bytes: int
    num_elements: int
    begin: int

    @property
    def size_bytes(self) -> int:
        """Of all elements."""
        return self.num_elements * self.item_bytes


def accumulator_bytes(source: Source, dtype: AccumulatorDtype = "float32", *, latest: Iterable[str] = ()) -> int:
    """What the accumulators of one average of checkpoints like `source` take: `StreamedShadow.state_bytes`.

    Raises:
        IncompatibleError: it cannot be averaged.
    """
    about = ShadowDescription("", dtype, specs_of(source), source.ties, coefficients={}, latest=tuple(latest))
    return size_of(slots_of(about, source.name))


def slots_of(about: ShadowDescription, name: str) -> dict[str, Slot]:
    """The slots of checkpoints as described, by tensor name, in the order of the storage.

    Raises:
        IncompatibleError: a tensor cannot be averaged; the message begins with `name`.
    """
    try:
        policies = about.policies
    except IncompatibleError as error:
        raise IncompatibleError(f"{name}: {error.message}", code=error.code) from None
    slots: dict[str, Slot] = {}
    end = 0
    dtypes = {spec.name: spec.dtype for spec in about.specs}
    # As files mostly have them, so that neighbours there are neighbours here (`wa_core.averaging.chains`); and
    # widest elements first, so that every accumulator is aligned to its own element size.
    order = [(-DTYPE_BYTES[format_dtype_name(spec.dtype)], dtypes[spec.name], spec) for spec in about.stored]
    for item, _, spec in sorted(order):
        num = math.prod(spec.shape)
        slots[spec.name] = Slot(spec.name, spec.dtype, policies[spec.name], -item, num, end)
        end += num * -item
    return slots


def size_of(slots: Mapping[str, Slot]) -> int:
    """Bytes of the storage that all slots take."""
    return sum(slot.size_bytes for slot in slots.values())


def pairs_of(slots: Mapping[str, Slot]) -> list[list[tuple[Slot, Slot]]]:
    """Pooled running means with their variances, those of the same dtypes together."""
    found: dict[tuple[str, str], list[tuple[Slot, Slot]]] = {}
    for mean in slots.values():
        if mean.policy is Policy.POOLED_MEAN:
            variance = slots[partner_of(mean.name)]
            found.setdefault((mean.dtype, variance.dtype), []).append((mean, variance))
    return list(found.values())
