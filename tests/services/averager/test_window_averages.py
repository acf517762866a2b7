"""Windows in the service: made from the checkpoints themselves, exact, and never across a branch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from support.averaging import ScriptedAssessor, WatchedStore, averager, exact_mean, run_until_idle, served_weights
from support.runs import HandmadeRun, random_weights
from wa_core import layout
from wa_core.averaging.rules import parse_rule
from wa_core.catalog.averages import Generations
from wa_core.records import AttemptFailed
from wa_core.store.memory import MemoryStore

STEPS = (10, 20, 30, 40, 50)


def assert_is_sum(store: MemoryStore, run_id: str, name: str, coefficients: dict[int, float]) -> None:
    """The served weights are the float64 weighted sum of the checkpoints, rounded once."""
    served = served_weights(store, run_id, name)
    for tensor, value in served.items():
        if value.is_floating_point() and "running" not in tensor:
            parts = [weight * random_weights(step)[tensor].double() for step, weight in coefficients.items()]
            exact = torch.stack(parts).sum(0)
            ulp = np.spacing(np.float32(exact.abs().max()))
            assert (value.double() - exact).abs().max() <= ulp


@pytest.mark.parametrize(
    "rule", ["window:last=3", "window:last=3,shape=cosine", "lawa:last=2,start_step=20", "window:last_steps=25"]
)
def test_a_window_is_the_exact_mean_of_its_checkpoints(rule: str) -> None:
    """The manifest's coefficients are the rule's, and the weights are their sum over the checkpoints."""
    store = MemoryStore()
    run = HandmadeRun(store, averages={"w": rule})
    for step in STEPS:
        run.checkpoint(step, random_weights(step))
    run.finish()
    run_until_idle(averager(store))
    manifest = Generations(store, run.run_id, "w").newest()
    assert manifest is not None
    assert manifest.coefficients == parse_rule(rule).coefficients(STEPS)
    assert len(manifest.folded) == len(manifest.coefficients)
    assert manifest.shadow is None
    assert_is_sum(store, run.run_id, "w", manifest.coefficients)


def test_a_window_beside_others_costs_no_second_read_until_it_is_made() -> None:
    """Folding reads a checkpoint once for accumulators and windows together."""
    store = MemoryStore()
    run = HandmadeRun(store, averages={"swa": "swa", "w": "window:last=2"})
    entries = [run.checkpoint(step, random_weights(step)) for step in STEPS]
    watched, assessor = WatchedStore(store), ScriptedAssessor()
    worker = averager(watched, assessor=assessor)
    while assessor.is_idle:
        worker.tick()
    files = [entry.files[layout.MODEL_FILE] for entry in entries]
    window = {ref.key for ref in files[-2:]}
    read = {ref.key: watched.bytes_read[ref.key] for ref in files if ref.key not in window}
    assert read == {ref.key: ref.size_bytes for ref in files if ref.key not in window}
    newest = Generations(store, run.run_id, "w").newest()
    assert newest is not None
    assert newest.coefficients == {40: 0.5, 50: 0.5}


def test_f17_a_window_holds_one_branch_after_a_rewind() -> None:
    """F17: after a resume from an older step the window is that of the surviving path."""
    store = MemoryStore()
    run = HandmadeRun(store, averages={"w": "window:last=2"})
    worker = averager(store)
    entries = {}
    for step in (10, 20, 30):
        entries[step] = run.checkpoint(step, random_weights(step))
        run_until_idle(worker)
    run.log.append(AttemptFailed(reason="worker_died"))
    run.start_attempt(resumed_from=entries[10].seq)
    run.checkpoint(40, random_weights(40))
    run.finish()
    run_until_idle(worker)
    assert_is_sum(store, run.run_id, "w", {10: 0.5, 40: 0.5})


def test_a_damaged_checkpoint_is_not_in_the_window() -> None:
    """A checkpoint whose bytes are not the recorded ones is rejected by windows too, when it is first read."""
    store = MemoryStore()
    run = HandmadeRun(store, averages={"w": "window:last=2"})
    run.checkpoint(10, random_weights(10))
    bad = run.checkpoint(20, random_weights(20))
    key = bad.files[layout.MODEL_FILE].key
    body = bytearray(store.get(key))
    body[-1] ^= 1
    store.put(key, bytes(body))
    run.checkpoint(30, random_weights(30))
    run.finish()
    run_until_idle(averager(store))
    manifest = Generations(store, run.run_id, "w").newest()
    assert manifest is not None
    assert [(aside.step, aside.code) for aside in manifest.rejected] == [(20, "digest_mismatch")]
    assert manifest.coefficients == {10: 0.5, 30: 0.5}


def test_integers_of_a_window_are_the_newest_ones() -> None:
    """A counter takes the newest checkpoint's value, as in every other average."""
    store = MemoryStore()
    run = HandmadeRun(store, averages={"w": "window:last=3"})
    for step in STEPS:
        run.checkpoint(step, random_weights(step))
    run.finish()
    run_until_idle(averager(store))
    assert served_weights(store, run.run_id, "w")["bn.num_batches_tracked"] == 50
    mean = exact_mean([random_weights(step) for step in (30, 40, 50)])
    assert torch.allclose(served_weights(store, run.run_id, "w")["scale"].double(), mean["scale"])
