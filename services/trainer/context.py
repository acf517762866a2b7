"""What a worker is told before it trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from wa_core.clock import Clock, SystemClock
from wa_core.publisher import UPLOAD_DEADLINE_S

if TYPE_CHECKING:
    from pathlib import Path

    from wa_core.store.base import ObjectStore


@dataclass(frozen=True, slots=True)
class TrainContext:
    """Where a worker stands: whose run, which attempt, which rank of how many.

    What is done is traced below `traceparent`. With `world_size` above 1 the default process group must be
    initialised. `device` is a torch device such as ``cpu`` or ``cuda:0``; `node` names the machine in the log. The
    run's package is unpacked in `scratch_dir`, or the system's temporary folder.
    """

    store: ObjectStore
    run_id: str
    attempt: int
    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    node: str = ""
    clock: Clock = field(default_factory=SystemClock)
    upload_deadline_s: float = UPLOAD_DEADLINE_S
    scratch_dir: Path | None = None
    traceparent: str | None = None
