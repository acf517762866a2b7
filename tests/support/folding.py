"""Folds checkpoints from a store in memory, and reads what comes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wa_core.averaging.files.bytes_writer import BytesWriter
from wa_core.averaging.files.output import SafetensorsWriter
from wa_core.averaging.files.passes import Pace
from wa_core.averaging.files.sources import open_object
from wa_core.averaging.rules import EmaRule, SwaRule
from wa_core.averaging.streaming import fold_source
from wa_core.store.memory import MemoryStore
from wa_core.tensors import read_checkpoint, serialize

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from wa_core.averaging.rules import Rule
    from wa_core.averaging.streamed_shadow import StreamedShadow


RULES: list[Rule] = [
    SwaRule(),
    EmaRule(half_life_steps=60),
    EmaRule(decay=0.9, init="first"),
    SwaRule(start_step=40),
]
PIECEMEAL = Pace(1000)  # many stretches, even of a small checkpoint


def fold(shadows: list[StreamedShadow], state: dict[str, Tensor], *, step: int, **how: Any) -> Any:
    """Fold a state from a store in memory."""
    store = MemoryStore()
    store.put("model.safetensors", serialize(state))
    return fold_source(open_object(store, "model.safetensors"), shadows, step=step, **how)


def kept(shadow: StreamedShadow, folder: Path) -> bytes:
    """The state that a shadow writes."""
    path = folder / "state.safetensors"
    shadow.write_state(SafetensorsWriter(path))
    return path.read_bytes()


def written(shadow: StreamedShadow) -> dict[str, Tensor]:
    """The average that a shadow writes into memory."""
    writer = BytesWriter()
    shadow.write_value(writer, metadata={})
    return read_checkpoint([writer.body]).tensors
