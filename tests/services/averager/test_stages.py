"""Folding, publishing and assessing as stages that do not wait for each other, and memory that stays bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from structlog.testing import capture_logs

from services.averager.scratch import Scratch
from services.averager.worker import Averager
from support.averaging import (
    ScriptedAssessor,
    WatchedStore,
    averager,
    newest,
    run_until_idle,
    same_bits,
    served_weights,
)
from support.faulty import Fault, FaultyStore
from support.runs import HandmadeRun, random_weights
from wa_core import layout
from wa_core.averaging.rules import parse_rule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.catalog.averages import Generations
from wa_core.catalog.runs import add_average, mark_active
from wa_core.clock import ManualClock
from wa_core.records import AverageRequest, RunState
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.store.base import ObjectInfo

AVERAGES = {"swa": "swa:start_step=20", "ema": "ema:half_life=30"}
STEPS = (10, 20, 30, 40, 50)


def folded_by_hand(rule: str, steps: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The same checkpoints folded in memory, in float64."""
    shadow = ShadowWeights(parse_rule(rule), dtype=torch.float64)  # type: ignore[arg-type]
    for step in steps:
        shadow.fold(random_weights(step), step=step)
    return shadow.value()


def test_an_assessment_that_takes_for_ever_keeps_no_generation_back() -> None:
    """While a job is under way, every new checkpoint is folded and published; then the newest is assessed."""
    store = MemoryStore()
    run = HandmadeRun(store, averages=AVERAGES)
    assessor = ScriptedAssessor()
    assessor.is_stuck = True
    worker = averager(store, assessor=assessor)
    for step in STEPS:
        entry = run.checkpoint(step, random_weights(step))
        run_until_idle(worker)
        assert newest(run, "ema").cursor == entry.seq
    assert assessor.num_jobs == 1
    assert Generations(store, run.run_id, "ema").newest_assessment() is None
    run.finish()
    assessor.is_stuck = False
    run_until_idle(worker)
    run.log.refresh()
    assert run.log.state is RunState.SUCCEEDED
    for name, rule in AVERAGES.items():
        record = Generations(store, run.run_id, name).newest_assessment()
        assert record is not None
        assert record.generation == newest(run, name).generation
        assert same_bits(served_weights(store, run.run_id, name), folded_by_hand(rule, STEPS))


def test_the_newest_checkpoint_is_read_once_though_it_is_measured_too() -> None:
    """Measuring the raw weights takes the copy that folding made of the bytes it read."""
    store = MemoryStore()
    run = HandmadeRun(store, averages=AVERAGES)
    watched = WatchedStore(store)
    worker = averager(watched)
    entries = []
    for step in STEPS:
        entries.append(run.checkpoint(step, random_weights(step)))
        run_until_idle(worker)
    files = [entry.files[layout.MODEL_FILE] for entry in entries]
    assert {ref.key: watched.bytes_read[ref.key] for ref in files} == {ref.key: ref.size_bytes for ref in files}


def test_f23_accumulators_in_a_scratch_file_give_the_same_bits() -> None:
    """F23: with no memory for accumulators at all, the averages are the same to the last bit."""
    store = MemoryStore()
    run = HandmadeRun(store, averages=AVERAGES)
    for step in STEPS:
        run.checkpoint(step, random_weights(step))
    run.finish()
    run_until_idle(averager(store, memory_bytes=0))
    for name, rule in AVERAGES.items():
        assert same_bits(served_weights(store, run.run_id, name), folded_by_hand(rule, STEPS))


def test_an_average_added_mid_run_catches_up() -> None:
    """Added to a run under way, an average folds what it has missed and then goes on with the others."""
    store = MemoryStore()
    run = HandmadeRun(store, averages={"swa": "swa"})
    worker = averager(store)
    for step in STEPS[:3]:
        run.checkpoint(step, random_weights(step))
        run_until_idle(worker)
    add_average(store, run.run_id, AverageRequest(name="late", rule="ema:half_life=20"), clock=run.clock)
    run_until_idle(worker)
    for step in STEPS[3:]:
        run.log.refresh()
        run.checkpoint(step, random_weights(step))
        run_until_idle(worker)
    run.finish()
    run_until_idle(worker)
    assert same_bits(served_weights(store, run.run_id, "late"), folded_by_hand("ema:half_life=20", STEPS))


def test_an_average_added_after_the_end_is_made_by_any_averager() -> None:
    """Added to a run that has succeeded, an average is folded, published and assessed; the run stays succeeded."""
    store = MemoryStore()
    run = HandmadeRun(store, averages={"swa": "swa"})
    for step in STEPS:
        run.checkpoint(step, random_weights(step))
    run.finish()
    run_until_idle(averager(store))
    add_average(store, run.run_id, AverageRequest(name="late", rule="window:last=2"), clock=run.clock)
    run_until_idle(averager(store))
    assert newest(run, "late").coefficients == {40: 0.5, 50: 0.5}
    assert served_weights(store, run.run_id, "late").keys() == random_weights(0).keys()
    run.log.refresh()
    assert run.log.state is RunState.SUCCEEDED
    assert list(store.list(layout.ACTIVE)) == []


class BusyStore(MemoryStore):
    """Somebody adds an average at the very moment in which the run's marker is taken away for the first time."""

    run: HandmadeRun | None = None

    def delete(self, key: str) -> None:
        """Remove an object, after what was added."""
        if key.startswith(layout.ACTIVE) and (run := self.run):
            self.run = None
            add_average(self, run.run_id, AverageRequest(name="late", rule="window:last=2"), clock=run.clock)
        super().delete(key)


class StirredStore(MemoryStore):
    """Somebody adds an average at the very moment in which an averager looks at those that there are."""

    run: HandmadeRun | None = None

    def list(self, prefix: str, start_after: str = "", *, delimiter: str | None = None) -> Iterator[ObjectInfo]:
        """List objects, after what was added."""
        if "/averages/" in prefix and (run := self.run):
            self.run = None
            add_average(self, run.run_id, AverageRequest(name="late", rule="window:last=2"), clock=run.clock)
        return super().list(prefix, start_after=start_after, delimiter=delimiter)


def test_an_average_added_while_an_ended_run_is_looked_at_is_made() -> None:
    """The averager reads of it in the middle of a step, which ends the run once more: the marker is put back."""
    store = StirredStore()
    run = HandmadeRun(store, averages={"swa": "swa"})
    for step in STEPS:
        run.checkpoint(step, random_weights(step))
    run.finish()
    run_until_idle(averager(store))
    mark_active(store, run.run_id, clock=run.clock)
    store.run = run

    run_until_idle(averager(store))

    assert newest(run, "late").coefficients == {40: 0.5, 50: 0.5}
    assert list(store.list(layout.ACTIVE)) == []


def test_an_average_added_while_the_run_is_forgotten_is_made() -> None:
    """Its marker goes with the run's, and the averager that took it away puts it back."""
    store = BusyStore()
    run = HandmadeRun(store, averages={"swa": "swa"})
    for step in STEPS:
        run.checkpoint(step, random_weights(step))
    run.finish()
    store.run = run

    run_until_idle(averager(store))

    assert newest(run, "late").coefficients == {40: 0.5, 50: 0.5}
    assert list(store.list(layout.ACTIVE)) == []


def test_f6_a_flipped_bit_on_the_way_is_read_again() -> None:
    """F6: a transfer that arrives wrong heals by reading again; nothing is rejected, and the bits are right."""
    inner = MemoryStore()
    run = HandmadeRun(inner, averages=AVERAGES)
    for step in STEPS:
        run.checkpoint(step, random_weights(step))
    run.finish()
    store = FaultyStore(inner)
    store.next_call("stream", Fault.FLIP_BIT, Fault.FLIP_BIT)
    with capture_logs() as logs:
        run_until_idle(averager(store))
    assert [line["event"] for line in logs].count("checkpoint_unsound") == 2
    for name, rule in AVERAGES.items():
        assert newest(run, name).rejected == []
        assert same_bits(served_weights(inner, run.run_id, name), folded_by_hand(rule, STEPS))


class OneFlip(MemoryStore):
    """A store that answers one read with one byte changed, which turns a tensor's name into another."""

    def __init__(self) -> None:
        super().__init__()
        self.flips: dict[str, bytes] = {}

    def stream(self, key: str, start: int = 0, *, end: int | None = None) -> Iterator[bytes]:
        """What is there, or what was prepared for the next read."""
        if key in self.flips:
            return iter([self.flips.pop(key)])
        return super().stream(key, start=start, end=end)


def test_f6_a_flipped_bit_in_a_name_blames_no_sound_checkpoint() -> None:
    """F6: what looks like another architecture is read again before the checkpoint is held to be at fault."""
    store = OneFlip()
    run = HandmadeRun(store, averages=AVERAGES)
    entries = [run.checkpoint(step, random_weights(step)) for step in STEPS]
    run.finish()
    key = entries[2].files[layout.MODEL_FILE].key
    store.flips[key] = store.get(key).replace(b"conv.weight", b"conv.weighu")
    run_until_idle(averager(store))
    for name, rule in AVERAGES.items():
        assert newest(run, name).rejected == []
        assert same_bits(served_weights(store, run.run_id, name), folded_by_hand(rule, STEPS))


def test_two_runs_take_turns() -> None:
    """With a long backlog in one run, another run's checkpoint does not wait for the end of it."""
    store = MemoryStore()
    busy, quick = (HandmadeRun(store, averages={"swa": "swa"}) for _ in range(2))
    for step in range(1, 41):
        busy.checkpoint(step, random_weights(step))
    entry = quick.checkpoint(1, random_weights(1))
    worker = averager(store)
    for _ in range(4):
        worker.tick()
    assert newest(quick, "swa").cursor == entry.seq
    assert Generations(store, busy.run_id, "swa").newest() is None


def test_a_stop_in_the_middle_of_a_fold_gives_it_up() -> None:
    """Asked to stop, an averager leaves a fold half-way and hands its runs over; the next one gets it right."""
    store = MemoryStore()
    run = HandmadeRun(store, averages=AVERAGES)
    for step in STEPS:
        run.checkpoint(step, random_weights(step))
    run.finish()
    with Scratch() as scratch:
        stopping = Averager(
            store, clock=ManualClock(), assessor=ScriptedAssessor(), scratch=scratch, should_stop=lambda: True
        )
        for _ in range(5):
            stopping.tick()
        stopping.close()
    assert Generations(store, run.run_id, "ema").newest() is None
    run_until_idle(averager(store))
    for name, rule in AVERAGES.items():
        assert same_bits(served_weights(store, run.run_id, name), folded_by_hand(rule, STEPS))
