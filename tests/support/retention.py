"""Runs that are trained, averaged and swept, and what is left of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.histories import MiniatureAverager, MiniatureRun, exists
from wa_core.catalog.averages import Generations
from wa_core.catalog.retention import Grace
from wa_core.catalog.sweeper import Sweeper
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from wa_core.catalog.retention import Verdict
    from wa_core.records import CheckpointPolicy
    from wa_core.store.base import ObjectStore


TENS = tuple(range(10, 110, 10))
NO_GRACE = Grace(orphan_s=0, download_s=0, settle_s=0)


def new_run(policy: CheckpointPolicy, store: ObjectStore | None = None, **averages: str) -> MiniatureRun:
    """A run with these averages; SWA when none is given."""
    return MiniatureRun(store or MemoryStore(), averages=averages or {"swa": "swa"}, policy=policy)


def train(run: MiniatureRun, *steps: int, losses: tuple[float, ...] = (), publishes: bool = True) -> None:
    """Checkpoints, each taken and published at once by every average."""
    averagers = [MiniatureAverager(run, name) for name in run.averages]
    for at, step in enumerate(steps):
        run.checkpoint(step, loss=losses[at] if losses else None)
        for averager in averagers if publishes else ():
            averager.catch_up()


def sweep(run: MiniatureRun, grace: Grace = NO_GRACE) -> dict[str, Verdict]:
    """Sweep, and return the verdicts."""
    return dict(Sweeper(run.store, run.run_id, clock=run.clock, grace=grace).sweep().verdicts)


def steps_left(run: MiniatureRun) -> list[int]:
    """The steps of the surviving checkpoints that are there."""
    return [entry.step for entry in run.log.lineage if run.has(entry)]


def states_left(run: MiniatureRun, name: str = "swa") -> list[int]:
    """The generations whose states are there."""
    found = Generations(run.store, run.run_id, name).newest_first()
    return [one.generation for one in found if one.shadow and exists(run.store, one.shadow.key)][::-1]
