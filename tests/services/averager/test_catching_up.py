"""An average that is added to a run: replayed or rebuilt by an averager, recorded, folded on and served."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from structlog.testing import capture_logs

from support.averaging import averager, run_until_idle, served_weights
from support.bad_checkpoints import good_state
from support.runs import HandmadeRun
from wa_core import layout
from wa_core.averaging.rules import parse_rule, require_lerp
from wa_core.catalog.averages import Generations
from wa_core.catalog.catch_up import plan_catch_up
from wa_core.catalog.holdings import fetch_holdings
from wa_core.catalog.rebuild import Rebuild
from wa_core.catalog.runs import add_average, fetch_spec
from wa_core.records import AverageRequest
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from support.seaweed import Seaweed
    from wa_core.records import AverageManifest
    from wa_core.store.base import ObjectStore

STEPS = tuple(range(10, 110, 10))
RULE = "power:sigma_rel=0.12"
FLOATS = ("layer.weight", "layer.bias", "scale")


def running_run(store: ObjectStore) -> HandmadeRun:
    """A run under way, ten checkpoints in, of which the first seven are gone."""
    run = HandmadeRun(store, averages={"power": "power:sigma_rel=0.1"})
    for step in STEPS:
        run.checkpoint(step, good_state(step))
    run_until_idle(averager(store))
    for entry in run.log.lineage[:7]:
        store.delete(entry.files[layout.MODEL_FILE].key)
    return run


def add(run: HandmadeRun, rule: str = RULE) -> None:
    """Ask for one more average."""
    add_average(run.store, run.run_id, AverageRequest(name="late", rule=rule), clock=run.clock)
    run.log.refresh()


def plan(run: HandmadeRun) -> Rebuild:
    """What an averager would do now."""
    spec = fetch_spec(run.store, run.run_id)
    found = plan_catch_up(fetch_holdings(run.store, spec, run.log.entries), parse_rule(RULE))
    assert isinstance(found, Rebuild)
    return found


def generation(run: HandmadeRun, number: int | None = None) -> AverageManifest:
    """A generation of the added average, or its newest."""
    generations = Generations(run.store, run.run_id, "late")
    found = generations.newest() if number is None else generations.fetch(number)
    assert found is not None
    return found


def blobs(run: HandmadeRun) -> set[str]:
    """The states of the added average."""
    listed = (info.key for info in run.store.list(layout.blobs_prefix(run.run_id, "late")))
    return {key for key in listed if key.endswith(layout.SHADOW_FILE)}


def test_a_rebuilt_beginning_is_folded_on_and_served(seaweed: Seaweed) -> None:
    """On a real store: the first generation records its parts; with new checkpoints it is their exact sum."""
    run = running_run(seaweed.new_store())
    add(run)
    expected = plan(run)

    run_until_idle(averager(run.store))

    first = generation(run, 1)
    assert first.rebuilt is not None
    assert first.cursor == first.rebuilt.through == run.log.lineage[-1].seq
    assert first.rebuilt.profile_error == pytest.approx(expected.profile_error)
    assert [part.file for part in first.rebuilt.parts] == [part.file for part in expected.parts]
    assert first.coefficients == pytest.approx(expected.coefficients)

    for step in (110, 120):
        run.checkpoint(step, good_state(step))
    run.finish()
    run_until_idle(averager(run.store))

    newest = generation(run)
    assert newest.rebuilt == first.rebuilt
    assert newest.rejected == []
    coefficients = folded_on(first.coefficients, (110, 120))
    assert newest.coefficients == pytest.approx(coefficients, abs=1e-14)
    served = served_weights(run.store, run.run_id, "late")
    for name in FLOATS:
        parts = [part * good_state(step)[name].double() for step, part in coefficients.items()]
        torch.testing.assert_close(served[name].double(), torch.stack(parts).sum(0), rtol=0, atol=5e-7)
    assert served["count"] == 120


def folded_on(coefficients: dict[int, float], steps: tuple[int, ...]) -> dict[int, float]:
    """Coefficients after more folds, by the rule's weights."""
    rule = require_lerp(parse_rule(RULE))
    for step in steps:
        weight = rule.weight(n_averaged=len(coefficients), step=step, prev_step=max(coefficients))
        coefficients = {old: value * (1 - weight) for old, value in coefficients.items()} | {step: weight}
    return coefficients


def test_a_replay_is_as_if_it_had_been_asked_for_from_the_start() -> None:
    """With all its checkpoints there, an average has no beginning but the first fold, and nothing is rejected."""
    run = running_run(MemoryStore())
    add(run, "swa:start_step=71")

    run_until_idle(averager(run.store))

    found = generation(run)
    assert found.rebuilt is None
    assert found.rejected == []
    assert found.coefficients == parse_rule("swa").coefficients([80, 90, 100])


def test_a_window_is_replayed_from_what_is_in_it() -> None:
    """Checkpoints that are gone and that the window has passed anyway are skipped, not rejected."""
    run = running_run(MemoryStore())
    add(run, "window:last=3")

    run_until_idle(averager(run.store))

    found = generation(run)
    assert found.coefficients == dict.fromkeys([80, 90, 100], 1 / 3)
    assert found.rejected == []
    assert [aside.step for aside in found.skipped] == list(STEPS[:7])
    assert {aside.code for aside in found.skipped} == {"before_window"}


def test_of_two_averagers_one_begins() -> None:
    """In lock-step both want to begin; the loser leaves no state behind, and goes on from the winner's."""
    run = running_run(MemoryStore())
    rivals = [averager(run.store), averager(run.store)]
    for rival in rivals:
        run_until_idle(rival)
    add(run)

    for _ in range(20):
        for rival in rivals:
            rival.tick()

    assert generation(run, 1).rebuilt is not None
    states = {
        found.shadow.key for found in Generations(run.store, run.run_id, "late").newest_first() if found.shadow
    }
    assert blobs(run) == states


def test_a_damaged_part_is_not_summed() -> None:
    """A part that is not what its record says is noticed by its digest; no generation ever holds it."""
    run = running_run(MemoryStore())
    newest = Generations(run.store, run.run_id, "power").newest()
    assert newest is not None
    assert newest.shadow is not None
    body = run.store.get(newest.shadow.key)
    run.store.put(newest.shadow.key, body[:-1] + bytes([body[-1] ^ 1]))
    add(run)

    with capture_logs() as logs:
        run_until_idle(averager(run.store))

    assert any(line["event"] == "rebuild_failed" for line in logs)
    found = generation(run)
    keys = {part.file.key for part in found.rebuilt.parts} if found.rebuilt else set()
    assert newest.shadow.key not in keys
