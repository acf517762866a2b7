"""An added average that begins with a rebuild: committed once, exact to its plan, folded on by the averager."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from services.averager.catching_up import begin_added_average
from support.averaging import averager, run_until_idle, served_weights
from support.bad_checkpoints import good_state
from support.faulty import Fault, FaultyStore
from support.runs import HandmadeRun
from wa_core import layout
from wa_core.averaging.rules import parse_rule, require_lerp
from wa_core.catalog.averages import Generations
from wa_core.catalog.catch_up import Rebuild, Replay
from wa_core.catalog.runs import add_average, fetch_spec
from wa_core.clock import ManualClock
from wa_core.errors import CorruptError, FencedError, InvalidInputError
from wa_core.records import AverageRequest
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from pathlib import Path

    from support.seaweed import Seaweed
    from wa_core.store.base import ObjectStore

STEPS = tuple(range(10, 110, 10))
LATE = AverageRequest(name="late", rule="power:sigma_rel=0.12")


def running_run(store: ObjectStore) -> HandmadeRun:
    """A run under way, ten checkpoints in, of which the first seven are gone."""
    run = HandmadeRun(store, averages={"power": "power:sigma_rel=0.1"})
    for step in STEPS:
        run.checkpoint(step, good_state(step))
    run_until_idle(averager(store))
    for entry in run.log.lineage[:7]:
        store.delete(entry.files[layout.MODEL_FILE].key)
    return run


def begin(run: HandmadeRun, folder: Path, request: AverageRequest = LATE) -> Replay | Rebuild:
    """Add an average and give it its beginning, as an averager does."""
    add_average(run.store, run.run_id, request, clock=run.clock)
    run.log.refresh()
    spec = fetch_spec(run.store, run.run_id)
    return begin_added_average(run.store, spec, run.log.entries, request, clock=ManualClock(), folder=folder)


def blobs(run: HandmadeRun) -> list[str]:
    """The files of the added average."""
    return [info.key for info in run.store.list(layout.blobs_prefix(run.run_id, "late"))]


def test_a_rebuilt_beginning_is_folded_on_and_served(seaweed: Seaweed, tmp_path: Path) -> None:
    """On a real store: the first generation records its parts; with new checkpoints it is their exact sum."""
    run = running_run(seaweed.new_store())

    plan = begin(run, tmp_path)

    assert isinstance(plan, Rebuild)
    first = Generations(run.store, run.run_id, "late").fetch(1)
    assert first.rebuilt is not None
    assert (first.rebuilt.through, first.cursor, first.attempt) == (
        run.log.lineage[-1].seq,
        first.rebuilt.through,
        1,
    )
    assert first.rebuilt.profile_error == plan.profile_error <= 0.05
    assert tuple(first.rebuilt.parts) == plan.parts
    assert first.coefficients == plan.coefficients
    assert list(tmp_path.iterdir()) == []

    for step in (110, 120):
        run.checkpoint(step, good_state(step))
    run.finish()
    run_until_idle(averager(run.store))

    newest = Generations(run.store, run.run_id, "late").newest()
    assert newest is not None
    assert newest.rebuilt == first.rebuilt
    assert newest.rejected == []
    expected = folded_on(plan, (110, 120))
    assert newest.coefficients == pytest.approx(expected, abs=1e-14)
    served = served_weights(run.store, run.run_id, "late")
    for name in ("layer.weight", "layer.bias", "scale"):
        parts = [part * good_state(step)[name].double() for step, part in expected.items()]
        torch.testing.assert_close(served[name].double(), torch.stack(parts).sum(0), rtol=0, atol=5e-7)
    assert served["count"] == 120


def folded_on(plan: Rebuild, steps: tuple[int, ...]) -> dict[int, float]:
    """A plan's coefficients after more folds, by the rule's weights."""
    coefficients, rule = dict(plan.coefficients), require_lerp(parse_rule(LATE.rule))
    for step in steps:
        weight = rule.weight(n_averaged=len(coefficients), step=step, prev_step=max(coefficients))
        coefficients = {old: value * (1 - weight) for old, value in coefficients.items()} | {step: weight}
    return coefficients


def test_a_replay_commits_nothing(tmp_path: Path) -> None:
    """With all its checkpoints there, an average has no beginning but the first fold."""
    run = running_run(MemoryStore())

    plan = begin(run, tmp_path, AverageRequest(name="late", rule="swa:start_step=71"))

    assert isinstance(plan, Replay)
    assert Generations(run.store, run.run_id, "late").numbers() == []
    assert blobs(run) == []


def test_of_two_averagers_one_begins(tmp_path: Path) -> None:
    """The second is fenced and leaves no file behind; the first's state stays."""
    run = running_run(MemoryStore())
    begin(run, tmp_path)
    kept = blobs(run)
    spec = fetch_spec(run.store, run.run_id)

    with pytest.raises(FencedError):
        begin_added_average(run.store, spec, run.log.entries, LATE, clock=ManualClock(), folder=tmp_path)

    assert blobs(run) == kept
    assert len(kept) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_enough_any_more_is_refused(tmp_path: Path) -> None:
    """Files that went since the average was asked for are noticed: nothing is committed, the reason has a code."""
    run = running_run(MemoryStore())
    for info in list(run.store.list(layout.blobs_prefix(run.run_id, "power"))):
        run.store.delete(info.key)

    with pytest.raises(InvalidInputError) as caught:
        begin(run, tmp_path)

    assert caught.value.code == "cannot_rebuild"
    assert Generations(run.store, run.run_id, "late").numbers() == []


def test_a_damaged_part_commits_nothing(tmp_path: Path) -> None:
    """A part that is not what its record says ends the work; no generation and no file is left."""
    run = running_run(MemoryStore())
    newest = Generations(run.store, run.run_id, "power").newest()
    assert newest is not None
    assert newest.shadow is not None
    body = run.store.get(newest.shadow.key)
    run.store.put(newest.shadow.key, body[:-1] + bytes([body[-1] ^ 1]))

    with pytest.raises(CorruptError) as caught:
        begin(run, tmp_path)

    assert caught.value.code == "digest_mismatch"
    assert Generations(run.store, run.run_id, "late").numbers() == []
    assert blobs(run) == []
    assert list(tmp_path.iterdir()) == []


def test_f4_a_lost_response_is_recognised(tmp_path: Path) -> None:
    """When the answer to the commit is lost, the beginning is there once, and nobody is fenced."""
    run = running_run(MemoryStore())
    add_average(run.store, run.run_id, LATE, clock=run.clock)
    run.log.refresh()
    faulty = FaultyStore(run.store)
    faulty.next_call("create", Fault.DROP_RESPONSE)
    spec = fetch_spec(run.store, run.run_id)

    plan = begin_added_average(faulty, spec, run.log.entries, LATE, clock=ManualClock(), folder=tmp_path)

    assert isinstance(plan, Rebuild)
    assert Generations(run.store, run.run_id, "late").numbers() == [1]
    assert len(blobs(run)) == 1


def test_long_work_can_be_given_up(tmp_path: Path) -> None:
    """What `on_progress` raises ends it, with nothing left behind."""
    run = running_run(MemoryStore())
    add_average(run.store, run.run_id, LATE, clock=run.clock)
    run.log.refresh()
    spec = fetch_spec(run.store, run.run_id)

    def give_up() -> None:
        raise RuntimeError("stopping")

    with pytest.raises(RuntimeError, match="stopping"):
        begin_added_average(
            run.store, spec, run.log.entries, LATE, clock=ManualClock(), folder=tmp_path, on_progress=give_up
        )

    assert blobs(run) == []
    assert list(tmp_path.iterdir()) == []
