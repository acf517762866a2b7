"""Verification: passes for what is right, and names what is not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from services.averager.scratch import Scratch
from services.averager.verify import Verified, verify
from support.averaging import averager, run_until_idle, served_weights
from support.runs import HandmadeRun, random_weights
from wa_core import layout
from wa_core.averaging.rules import parse_rule
from wa_core.catalog.averages import Generations
from wa_core.catalog.runs import add_average
from wa_core.clock import SystemClock
from wa_core.errors import AverageNotFoundError, CorruptError, NoAverageYetError
from wa_core.records import AttemptFailed, AverageRequest
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from wa_core.records import AssessmentRecord, AverageManifest

AVERAGES = {
    "swa": "swa:start_step=20",
    "ema": "ema:half_life=30",
    "power": "power:sigma_rel=0.2",
    "w": "window:last=3,shape=cosine",
}
STEPS = (10, 20, 30, 40, 50)


@pytest.fixture
def run() -> HandmadeRun:
    """A run that has succeeded, with averages of every kind."""
    run = HandmadeRun(MemoryStore(), averages=AVERAGES)
    for step in STEPS:
        run.checkpoint(step, random_weights(step))
    run.finish()
    run_until_idle(averager(run.store))
    run.log.refresh()
    return run


def verified(run: HandmadeRun, name: str, *, generation: int | None = None) -> Verified:
    """What verifying says."""
    with Scratch() as scratch:
        return verify(run.store, run.run_id, name, clock=SystemClock(), scratch=scratch, generation=generation)


def newest(run: HandmadeRun, name: str) -> tuple[AverageManifest, AssessmentRecord]:
    """The newest generation and its assessment."""
    generations = Generations(run.store, run.run_id, name)
    manifest, record = generations.newest(), generations.newest_assessment()
    assert manifest is not None
    assert record is not None
    return manifest, record


def flip(run: HandmadeRun, key: str, at: int = -1) -> None:
    """Change one byte of an object."""
    body = bytearray(run.store.get(key))
    body[at] ^= 1
    run.store.put(key, bytes(body))


def refused(run: HandmadeRun, name: str) -> CorruptError:
    """The error that verifying ends in."""
    with pytest.raises(CorruptError) as caught:
        verified(run, name)
    return caught.value


@pytest.mark.parametrize("name", AVERAGES)
def test_every_kind_of_average_verifies(run: HandmadeRun, name: str) -> None:
    """SWA, EMA, power EMA and windows are recomputed to the last bit, state and served weights."""
    found = verified(run, name)
    manifest, record = newest(run, name)
    assert found.steps == tuple(manifest.coefficients)
    assert found.is_state_equal is (None if name == "w" else True)
    assert (found.generation, found.served_generation) == (manifest.generation, record.generation)


def test_f17_an_average_verifies_after_a_rewind() -> None:
    """F17: what the surviving path gives is what is verified, abandoned checkpoints lying beside it."""
    run = HandmadeRun(MemoryStore(), averages={"swa": "swa"})
    worker = averager(run.store)
    first = run.checkpoint(10, random_weights(10))
    run.checkpoint(20, random_weights(20))
    run_until_idle(worker)
    run.log.append(AttemptFailed(reason="worker_died"))
    run.start_attempt(resumed_from=first.seq)
    run.checkpoint(20, random_weights(120))
    run.finish()
    run_until_idle(worker)
    assert verified(run, "swa").steps == (10, 20)


def rebuilt_run() -> HandmadeRun:
    """A run that has let its early checkpoints go, and to which an average was added after that."""
    run = HandmadeRun(MemoryStore(), averages={"power": "power:sigma_rel=0.2", "swa": "swa"})
    worker = averager(run.store)
    entries = []
    for step in range(10, 210, 10):
        entries.append(run.checkpoint(step, random_weights(step)))
        run_until_idle(worker)
    for entry in entries[:-3]:
        run.store.delete(entry.files[layout.MODEL_FILE].key)
    add_average(run.store, run.run_id, AverageRequest(name="late", rule="ema:half_life=60"), clock=run.clock)
    run_until_idle(worker)
    run.log.refresh()
    run.checkpoint(210, random_weights(210))
    run.finish()
    run_until_idle(worker)
    run.log.refresh()
    return run


def test_an_average_added_after_retention_is_rebuilt_and_verifies() -> None:
    """Rebuilt from what is kept within its predicted error, folded on, and proved from its parts."""
    run = rebuilt_run()
    manifest, _ = newest(run, "late")
    assert manifest.rebuilt is not None
    assert manifest.rejected == []
    exact = parse_rule("ema:half_life=60").coefficients(list(range(10, 220, 10)))
    error = sum((manifest.coefficients.get(step, 0) - value) ** 2 for step, value in exact.items()) ** 0.5
    assert error / sum(value**2 for value in exact.values()) ** 0.5 <= manifest.rebuilt.profile_error + 1e-9
    served = served_weights(run.store, run.run_id, "late")["conv.weight"].double()
    parts = [
        weight * random_weights(step)["conv.weight"].double() for step, weight in manifest.coefficients.items()
    ]
    assert torch.allclose(served, torch.stack(parts).sum(0), atol=1e-6)
    assert verified(run, "late").is_state_equal


def test_a_rebuilt_average_whose_parts_are_gone_says_so() -> None:
    """What it was summed from is named as missing."""
    run = rebuilt_run()
    manifest, _ = newest(run, "late")
    assert manifest.rebuilt is not None
    run.store.delete(manifest.rebuilt.parts[0].file.key)
    assert refused(run, "late").code == "checkpoint_missing"


def test_one_changed_byte_of_a_checkpoint_is_found(run: HandmadeRun) -> None:
    """The sentence names the step, and that it is not what was committed."""
    flip(run, run.log.lineage[2].files[layout.MODEL_FILE].key)
    error = refused(run, "swa")
    assert error.code == "checkpoint_changed"
    assert "step 30" in error.message


def test_a_deleted_checkpoint_is_named(run: HandmadeRun) -> None:
    """Without a checkpoint nothing can be recomputed; which one is missing is said."""
    run.store.delete(run.log.lineage[3].files[layout.MODEL_FILE].key)
    error = refused(run, "ema")
    assert error.code == "checkpoint_missing"
    assert "step 40" in error.message


def test_changed_accumulators_are_found(run: HandmadeRun) -> None:
    """One byte of the stored state is enough."""
    shadow = newest(run, "swa")[0].shadow
    assert shadow is not None
    flip(run, shadow.key)
    assert refused(run, "swa").code == "state_differs"


def test_changed_served_weights_are_found(run: HandmadeRun) -> None:
    """One byte of what users download is enough."""
    flip(run, newest(run, "ema")[1].files[layout.MODEL_FILE].key)
    assert refused(run, "ema").code == "weights_differ"


def test_a_manifest_that_lies_is_found(run: HandmadeRun) -> None:
    """Coefficients that the rule does not give for the named checkpoints are refused before anything is read."""
    manifest, _ = newest(run, "swa")
    key = layout.generation(run.run_id, "swa", manifest.generation)
    record = json.loads(run.store.get(key))
    record["coefficients"] = {"20": 0.4, "30": 0.2, "40": 0.2, "50": 0.2}
    run.store.put(key, json.dumps(record).encode())
    assert refused(run, "swa").code == "wrong_coefficients"


def test_a_checkpoint_counted_twice_is_found(run: HandmadeRun) -> None:
    """A manifest that folds one checkpoint twice is not verified, even if its numbers sum to 1."""
    manifest, _ = newest(run, "swa")
    key = layout.generation(run.run_id, "swa", manifest.generation)
    record = json.loads(run.store.get(key))
    record["folded"].append(record["folded"][-1])
    run.store.put(key, json.dumps(record).encode())
    assert refused(run, "swa").code == "wrong_coefficients"


def test_what_is_not_there_is_said(run: HandmadeRun) -> None:
    """An unknown average lists those that exist; one without a checkpoint says so."""
    with pytest.raises(AverageNotFoundError, match="swa, ema, power, w"):
        verified(run, "nope")
    empty = HandmadeRun(MemoryStore(), averages={"swa": "swa"})
    with pytest.raises(NoAverageYetError):
        verified(empty, "swa")
