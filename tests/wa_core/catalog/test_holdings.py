"""What there is of a run, read from a bucket; and a rebuild carried out from it, against float64 brute force."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from support.averaging import averager, run_until_idle
from support.bad_checkpoints import good_state, misfit
from support.runs import HandmadeRun
from wa_core import layout
from wa_core.averaging.files.bytes_writer import BytesWriter
from wa_core.averaging.files.sources import open_object
from wa_core.averaging.rules import parse_rule, require_lerp
from wa_core.averaging.streamed_shadow import StreamedShadow
from wa_core.catalog.averages import Generations
from wa_core.catalog.catch_up import Replay, plan_catch_up
from wa_core.catalog.holdings import fetch_holdings
from wa_core.catalog.rebuild import Rebuild
from wa_core.catalog.rebuilt_state import make_rebuilt_state
from wa_core.catalog.runs import fetch_spec
from wa_core.errors import CorruptError, InvalidInputError
from wa_core.store.memory import MemoryStore
from wa_core.tensors import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable

    from support.seaweed import Seaweed
    from wa_core.catalog.rebuild import Holdings
    from wa_core.store.base import ObjectStore

STEPS = tuple(range(10, 210, 10))


def trained_run(store: ObjectStore, *, bad_step: int | None = None) -> HandmadeRun:
    """A run of 20 checkpoints with two power averages, folded to its end."""
    averages = {"narrow": "power:sigma_rel=0.05", "wide": "power:sigma_rel=0.2"}
    run, worker = HandmadeRun(store, averages=averages), averager(store)
    for step in STEPS:
        if step == bad_step:
            run.checkpoint_bytes(step, misfit(step, {"scale": torch.tensor(float("nan"))}))
        else:
            run.checkpoint(step, good_state(step))
        run_until_idle(worker)
    run.finish()
    run_until_idle(worker)
    return run


def lose(run: HandmadeRun, steps: Iterable[int]) -> None:
    """Delete the weights of these steps."""
    run.log.refresh()
    for entry in run.log.lineage:
        if entry.step in set(steps):
            run.store.delete(entry.files[layout.MODEL_FILE].key)


def holdings(run: HandmadeRun) -> Holdings:
    """What there is now."""
    run.log.refresh()
    return fetch_holdings(run.store, fetch_spec(run.store, run.run_id), run.log.entries)


def test_everything_is_found() -> None:
    """All checkpoints and one state for each generation that has one; what was rejected is known as unsound."""
    run = trained_run(MemoryStore(), bad_step=50)

    found = holdings(run)

    assert [entry.step for entry in found.lineage] == list(STEPS)
    assert {aside.step: aside.code for aside in found.unsound.values()} == {50: "not_finite"}
    assert all(found.has(entry) for entry in found.sound())
    assert {state.name for state in found.states} == {"narrow", "wide"}
    assert len({state.shadow.key for state in found.states if state.shadow}) == len(found.states) == 38
    assert isinstance(plan_catch_up(found, parse_rule("swa")), Replay)


def test_what_is_gone_is_not_found() -> None:
    """Deleted weights and states are missed, a damaged manifest is passed over, and what is left is used."""
    run = trained_run(MemoryStore())
    lose(run, STEPS[:15])
    generations = Generations(run.store, run.run_id, "wide")
    run.store.put(layout.generation(run.run_id, "wide", generations.numbers()[-1]), b"rotten")
    for number in generations.numbers()[:-2]:
        shadow = generations.fetch(number).shadow
        assert shadow is not None
        run.store.delete(shadow.key)

    found = holdings(run)

    assert [entry.step for entry in found.sound() if found.has(entry)] == list(STEPS[15:])
    assert len([state for state in found.states if state.name == "wide"]) == 1
    assert isinstance(plan_catch_up(found, parse_rule("power:sigma_rel=0.05")), Rebuild)


@pytest.mark.parametrize("rule", ["ema:half_life=20", "power:sigma_rel=0.1", "ema:half_life=30,init=first"])
def test_a_rebuild_is_the_sum_that_its_plan_says(seaweed: Seaweed, rule: str) -> None:
    """On a real store: after most checkpoints are gone, the state is the planned weighted sum of all of them."""
    run = trained_run(seaweed.new_store())
    lose(run, STEPS[:17])
    plan = plan_catch_up(holdings(run), parse_rule(rule))
    assert isinstance(plan, Rebuild)
    assert plan.profile_error <= 0.05

    writer = BytesWriter()
    make_rebuilt_state(
        run.store,
        plan.parts,
        writer,
        rule=require_lerp(parse_rule(rule)),
        dtype="float64",
        coefficients=plan.coefficients,
    )

    found = read_checkpoint([writer.body]).tensors
    for name in ("layer.weight", "layer.bias", "scale"):
        parts = [value * good_state(step)[name].double() for step, value in plan.coefficients.items()]
        expected = torch.stack(parts).sum(0)
        assert (found[name] - expected).abs().max() <= 1e-12
        wanted = parse_rule(rule).coefficients(STEPS)
        true = torch.stack([value * good_state(step)[name].double() for step, value in wanted.items()]).sum(0)
        largest = max(good_state(step)[name].abs().max() for step in STEPS)
        bound = plan.profile_error * np.linalg.norm(list(wanted.values())) * np.sqrt(len(STEPS)) * largest
        assert (expected - true).abs().max() <= bound
    assert found["count"] == STEPS[-1]
    run.store.put("state", writer.body)
    with closing(open_object(run.store, "state")) as source:
        shadow = StreamedShadow.restore(require_lerp(parse_rule(rule)), source)
    assert shadow.coefficients() == plan.coefficients
    assert shadow.n_averaged == len(STEPS)


def test_a_part_that_went_in_between_is_told_apart_from_a_damaged_one() -> None:
    """Gone: plan anew. Changed: its digest shows. Either way nothing is written."""
    run = trained_run(MemoryStore())
    lose(run, STEPS[:17])
    rule = require_lerp(parse_rule("ema:half_life=20"))
    plan = plan_catch_up(holdings(run), rule)
    assert isinstance(plan, Rebuild)
    key = plan.parts[0].file.key
    body = run.store.get(key)

    for damage, code in ((body[:-1] + bytes([body[-1] ^ 1]), "digest_mismatch"), (None, "object_missing")):
        if damage is None:
            run.store.delete(key)
        else:
            run.store.put(key, damage)
        writer = BytesWriter()
        with pytest.raises(CorruptError) as caught:
            make_rebuilt_state(
                run.store, plan.parts, writer, rule=rule, dtype="float64", coefficients=plan.coefficients
            )
        assert caught.value.code == code
        with pytest.raises(InvalidInputError):
            writer.body  # noqa: B018  reading it is the test
