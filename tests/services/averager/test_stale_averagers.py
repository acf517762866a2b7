"""Averagers that act on what was true some time ago: found by the simulator, written down step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from support.averaging import averager, run_until_idle, same_bits, served_weights
from support.faulty import Fault, FaultyStore
from support.runs import HandmadeRun, random_weights
from wa_core import layout
from wa_core.averaging.rules import parse_rule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.catalog.averages import Generations
from wa_core.catalog.history import branched_at
from wa_core.records import AttemptFailed, AttemptStarted, CheckpointCommitted
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from wa_core.store.base import ObjectStore

RULE = "swa"


class Interrupted:
    """A store that lets others act right before the first call that `is_due` says so of."""

    def __init__(self, inner: ObjectStore, is_due: Callable[[str, str], bool], act: Callable[[], object]) -> None:
        self._inner = inner
        self._is_due = is_due
        self._act: Callable[[], object] | None = act

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._inner, name)

        def interrupted(key: str, *args: Any, **options: Any) -> Any:
            if self._act is not None and self._is_due(name, key):
                act, self._act = self._act, None
                act()
            return operation(key, *args, **options)

        return interrupted


def mean_of(*steps: int) -> dict[str, torch.Tensor]:
    """The SWA of the checkpoints of these steps, folded in memory."""
    import torch

    shadow = ShadowWeights(parse_rule(RULE), dtype=torch.float64)
    for step in steps:
        shadow.fold(random_weights(step), step=step)
    return shadow.value()


def folded(run: HandmadeRun) -> list[int]:
    """The steps in the newest generation."""
    manifest = Generations(run.store, run.run_id, RULE).newest()
    assert manifest is not None
    return list(manifest.coefficients)


def test_f3_a_log_read_before_the_newest_generation_takes_nothing_back() -> None:
    """F3: stopped between reading log and generations until the run has ended, it publishes nothing older."""
    store = MemoryStore()
    run = HandmadeRun(store, averages={RULE: RULE})
    run.checkpoint(10, random_weights(10))

    def go_on_without_it() -> None:
        run.checkpoint(20, random_weights(20))
        run.finish()
        run_until_idle(averager(store))

    generations = layout.generations_prefix(run.run_id, RULE)
    stopped = Interrupted(store, lambda name, key: name == "list" and key == generations, go_on_without_it)
    run_until_idle(averager(stopped))

    assert folded(run) == [10, 20]
    assert same_bits(served_weights(store, run.run_id, RULE), mean_of(10, 20))


def abandon(run: HandmadeRun, entries: dict[int, CheckpointCommitted], *, keep: int) -> None:
    """Resume from an older checkpoint, and finish at once."""
    run.log.append(AttemptFailed(reason="worker_died"))
    run.start_attempt(resumed_from=entries[keep].seq)
    run.finish()


def test_f17_no_run_ends_while_its_newest_generation_is_of_an_abandoned_branch() -> None:
    """F17: one averager knows only the surviving path, another has published past it; the end is the former's."""
    store = MemoryStore()
    run = HandmadeRun(store, averages={RULE: RULE})
    behind, ahead = averager(store), averager(store)
    entries = {10: run.checkpoint(10, random_weights(10))}
    run_until_idle(behind)
    run.checkpoint(20, random_weights(20))
    run_until_idle(ahead)
    assert folded(run) == [10, 20]

    abandon(run, entries, keep=10)
    run_until_idle(behind)

    assert folded(run) == [10]
    assert same_bits(served_weights(store, run.run_id, RULE), mean_of(10))


def test_f17_a_zombie_cannot_publish_an_abandoned_branch_after_the_end() -> None:
    """F17: stopped just before it creates a generation, it is refused when the run has ended on another path."""
    store = MemoryStore()
    run = HandmadeRun(store, averages={RULE: RULE})
    entries = {10: run.checkpoint(10, random_weights(10))}
    run_until_idle(averager(store))
    run.checkpoint(20, random_weights(20))

    def end_on_another_path() -> None:
        abandon(run, entries, keep=10)
        run_until_idle(averager(store))

    second = layout.generation(run.run_id, RULE, 2)
    zombie = Interrupted(store, lambda name, key: (name, key) == ("create", second), end_on_another_path)
    run_until_idle(averager(zombie))

    assert folded(run) == [10]
    assert same_bits(served_weights(store, run.run_id, RULE), mean_of(10))


def test_f6_one_bad_read_of_a_state_takes_nothing_back() -> None:
    """F6: a state that arrives with a wrong bit is read again; no older generation is published over it."""
    inner = MemoryStore()
    store = FaultyStore(inner)
    run = HandmadeRun(inner, averages={RULE: RULE})
    for step in (10, 20):
        run.checkpoint(step, random_weights(step))
        run_until_idle(averager(inner))
    run.finish()
    numbers = Generations(inner, run.run_id, RULE).numbers()
    for operation in ("stream", "get"):
        store.next_call(operation, *[Fault.FLIP_BIT] * (operation == "stream"))

    run_until_idle(averager(store))

    assert [fault for *_, fault in store.faults] == [Fault.FLIP_BIT]
    assert Generations(inner, run.run_id, RULE).numbers() == numbers
    assert folded(run) == [10, 20]


def test_a_branch_is_an_attempt_that_left_checkpoints_behind() -> None:
    """Resuming at the last checkpoint abandons nothing; resuming before it, or from nothing, does."""

    def checkpoint(seq: int) -> CheckpointCommitted:
        return CheckpointCommitted(seq=seq, step=seq, files={}, spec_digest="0" * 64)

    def start(attempt: int, resumed_from: int | None) -> AttemptStarted:
        return AttemptStarted(seq=90 + attempt, attempt=attempt, runner_id="r", resumed_from=resumed_from)

    onward = [start(1, None), checkpoint(2), checkpoint(3), start(2, 3), checkpoint(5)]
    assert branched_at(onward) == 0
    assert branched_at([*onward, start(3, 3)]) == 3
    assert branched_at([*onward, start(3, 3), checkpoint(7), start(4, 7)]) == 3
    assert branched_at([*onward, start(3, None), start(4, None)]) == 3
