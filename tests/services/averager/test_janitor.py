"""Sweeping between other work: what a policy lets go is gone in the end, and nothing else is."""

from __future__ import annotations

from services.averager.janitor import SWEEP_EVERY_S, Janitor
from support.averaging import averager, run_until_idle, same_bits, served_weights
from support.runs import HandmadeRun, random_weights
from wa_core import layout
from wa_core.clock import ManualClock
from wa_core.records import CheckpointPolicy
from wa_core.store.memory import MemoryStore

STEPS = (10, 20, 30, 40, 50, 60)


def ended_run(store: MemoryStore, policy: CheckpointPolicy) -> HandmadeRun:
    """A run that has succeeded."""
    run = HandmadeRun(store, averages={"swa": "swa"}, checkpoint=policy)
    worker = averager(store)
    for step in STEPS:
        run.checkpoint(step, random_weights(step))
        run_until_idle(worker)
    run.finish()
    run_until_idle(worker)
    return run


def kept_steps(store: MemoryStore, run: HandmadeRun) -> list[int]:
    """The steps of the checkpoints that are still in the bucket."""
    run.log.refresh()
    there = {info.key for info in store.list(layout.run_prefix(run.run_id))}
    return [entry.step for entry in run.log.lineage if entry.files[layout.MODEL_FILE].key in there]


def test_keep_last_holds_after_the_end() -> None:
    """With `keep_last=2` the last two checkpoints stay, and what is served stays downloadable, bit for bit."""
    store = MemoryStore()
    run = ended_run(store, CheckpointPolicy(keep_last=2))
    before = served_weights(store, run.run_id, "swa")
    clock = ManualClock()
    janitor = Janitor(store, clock=clock)
    janitor.sweep_if_due(held=(), active=())
    assert kept_steps(store, run) == list(STEPS)
    clock.advance(SWEEP_EVERY_S)
    janitor.sweep_if_due(held=(), active=())
    assert kept_steps(store, run) == [50, 60]
    assert same_bits(served_weights(store, run.run_id, "swa"), before)


def test_without_a_policy_every_checkpoint_stays() -> None:
    """A run whose submission names no policy keeps all its checkpoints."""
    store = MemoryStore()
    run = ended_run(store, CheckpointPolicy())
    clock = ManualClock()
    janitor = Janitor(store, clock=clock)
    clock.advance(SWEEP_EVERY_S)
    janitor.sweep_if_due(held=(), active=())
    assert kept_steps(store, run) == list(STEPS)


def test_a_run_held_by_another_averager_is_left_to_it() -> None:
    """Active runs are swept by whoever holds them, and by nobody else."""
    store = MemoryStore()
    run = ended_run(store, CheckpointPolicy(keep_last=1))
    clock = ManualClock()
    janitor = Janitor(store, clock=clock)
    clock.advance(SWEEP_EVERY_S)
    janitor.sweep_if_due(held=(), active=[run.run_id])
    assert kept_steps(store, run) == list(STEPS)
    clock.advance(SWEEP_EVERY_S)
    janitor.sweep_if_due(held=[run.run_id], active=[run.run_id])
    assert kept_steps(store, run) == [60]


def test_a_damaged_run_stops_no_sweep() -> None:
    """A run whose log cannot be read is logged and left alone; the next one is swept in its turn."""
    store = MemoryStore()
    sound, damaged = (ended_run(store, CheckpointPolicy(keep_last=1)) for _ in range(2))
    store.put(layout.log_entry(damaged.run_id, 2), b"{")
    clock = ManualClock()
    janitor = Janitor(store, clock=clock)
    for _ in range(2):
        clock.advance(SWEEP_EVERY_S)
        janitor.sweep_if_due(held=(), active=())
    assert kept_steps(store, sound) == [60]
