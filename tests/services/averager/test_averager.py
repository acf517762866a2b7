"""The averaging worker against a bucket, with crashes, rivals, rewinds and bad checkpoints."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from support.averaging import (
    Crash,
    ScriptedAssessor,
    WatchedStore,
    assessment_of,
    averager,
    exact_mean,
    newest,
    newest_assessment,
    run_until_idle,
    same_bits,
    served_weights,
)
from support.runs import HandmadeRun, random_weights
from wa_core import layout
from wa_core.averaging.files.rebuild import recorded_coefficients
from wa_core.averaging.rules import parse_rule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.catalog.runs import list_active
from wa_core.errors import StoreUnavailableError
from wa_core.records import Assessment, AttemptFailed, BatchNormSummary, RunState
from wa_core.store.memory import MemoryStore
from wa_core.tensors import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.store.base import ObjectInfo

AVERAGES = {"swa": "swa:start_step=20", "ema": "ema:half_life=30"}
STEPS = (10, 20, 30, 40, 50)


def finished_run(store: MemoryStore, steps: tuple[int, ...] = STEPS) -> HandmadeRun:
    """A run whose training is over, with one sound checkpoint per step."""
    run = HandmadeRun(store, averages=AVERAGES)
    for step in steps:
        run.checkpoint(step, random_weights(step))
    run.finish()
    return run


def test_the_served_average_is_the_exact_mean() -> None:
    """The SWA equals a float64 brute-force mean within one float32 ulp of the largest magnitude."""
    store = MemoryStore()
    run = finished_run(store)
    run_until_idle(averager(store))
    served = served_weights(store, run.run_id, "swa")
    for name, mean in exact_mean([random_weights(step) for step in STEPS if step >= 20]).items():
        ulp = np.spacing(np.float32(mean.abs().max()))
        assert (served[name].double() - mean).abs().max() <= ulp


def test_a_run_ends_when_its_averages_are_published() -> None:
    """`succeeded` comes after the last generation, which names cursor and coefficients, and its served files."""
    store = MemoryStore()
    run = finished_run(store)
    run_until_idle(averager(store))
    run.log.refresh()
    assert run.log.state is RunState.SUCCEEDED
    assert list(list_active(store)) == []
    manifest = newest(run, "swa")
    assert manifest.cursor == run.log.lineage[-1].seq
    assert manifest.coefficients.keys() == {20, 30, 40, 50}
    assert sum(manifest.coefficients.values()) == pytest.approx(1, abs=1e-12)
    assert [aside.step for aside in manifest.skipped] == [10]
    assert newest_assessment(store, run.run_id, "swa").files.keys() == {layout.MODEL_FILE, layout.PICKLE_FILE}


def test_a_served_file_says_what_is_in_it() -> None:
    """The metadata of a download names run, rule and coefficients, so that it can be rebuilt from later."""
    store = MemoryStore()
    run = finished_run(store)
    run_until_idle(averager(store))
    manifest = newest(run, "ema")
    ref = newest_assessment(store, run.run_id, "ema").files[layout.MODEL_FILE]
    metadata = read_checkpoint(store.stream(ref.key)).metadata
    assert (metadata["weights"], metadata["run_id"], metadata["rule"]) == ("averaged", run.run_id, AVERAGES["ema"])
    assert (metadata["average"], metadata["generation"]) == ("ema", str(manifest.generation))
    assert metadata["batchnorm"] == "skipped"
    digests = {source["step"]: source["sha256"][layout.MODEL_FILE] for source in json.loads(metadata["sources"])}
    assert digests == {entry.step: entry.files[layout.MODEL_FILE].sha256 for entry in run.log.lineage}
    assert recorded_coefficients(metadata) == manifest.coefficients


def test_integers_take_the_latest_value() -> None:
    """A counter is the newest checkpoint's, never a mean."""
    store = MemoryStore()
    run = finished_run(store)
    run_until_idle(averager(store))
    assert served_weights(store, run.run_id, "ema")["bn.num_batches_tracked"] == 50


def test_each_checkpoint_is_read_once_for_all_averages() -> None:
    """Two averages cost one read of each checkpoint, byte for byte."""
    store = MemoryStore()
    run = finished_run(store)
    watched = WatchedStore(store)
    run_until_idle(averager(watched))
    sizes = {
        entry.files[layout.MODEL_FILE].key: entry.files[layout.MODEL_FILE].size_bytes for entry in run.log.lineage
    }
    assert {key: watched.bytes_read.get(key) for key in sizes} == sizes


def test_f1_a_crash_after_any_store_operation_changes_nothing() -> None:
    """F1: killed after every single store operation and restarted, the result is bit-identical, counted once."""
    undisturbed = MemoryStore()
    reference = finished_run(undisturbed)
    watched = WatchedStore(undisturbed)
    run_until_idle(averager(watched))
    expected = {name: served_weights(undisturbed, reference.run_id, name) for name in AVERAGES}
    for crash_after in range(watched.num_operations):
        store = MemoryStore()
        run = finished_run(store)
        try:
            run_until_idle(averager(WatchedStore(store, crash_after=crash_after)))
        except Crash:
            run_until_idle(averager(store))
        for name, weights in expected.items():
            assert same_bits(served_weights(store, run.run_id, name), weights), crash_after
            assert newest(run, name).coefficients == newest(reference, name).coefficients


def test_two_averagers_at_once_fold_nothing_twice() -> None:
    """Of two averagers in lock-step one is fenced each time; the result is as if there had been one."""
    store = MemoryStore()
    run = HandmadeRun(store, averages=AVERAGES)
    rivals = [averager(store), averager(store)]
    with capture_logs() as logs:
        for step in STEPS:
            run.checkpoint(step, random_weights(step))
            for _ in range(4):
                # Both read the log and fold before either publishes.
                for rival in rivals:
                    rival.tick()
        run.finish()
        for rival in rivals:
            run_until_idle(rival)
    assert any(line["event"] == "fenced" for line in logs)
    shadow = ShadowWeights(parse_rule(AVERAGES["swa"]), dtype=torch.float64)
    for step in STEPS:
        shadow.fold(random_weights(step), step=step)
    assert same_bits(served_weights(store, run.run_id, "swa"), shadow.value())
    folded = newest(run, "swa").folded
    assert len(folded) == len(set(folded)) == 4


def test_an_abandoned_branch_leaves_the_average() -> None:
    """After a resume from an older checkpoint the average holds the surviving path alone, bit for bit."""
    store = MemoryStore()
    run = HandmadeRun(store, averages=AVERAGES)
    worker = averager(store)
    entries = {step: run.checkpoint(step, random_weights(step)) for step in (20, 30, 40)}
    run_until_idle(worker)
    run.log.append(AttemptFailed(reason="worker_died"))
    run.start_attempt(resumed_from=entries[20].seq)
    run.checkpoint(30, random_weights(130))
    run.checkpoint(40, random_weights(140))
    run.finish()
    run_until_idle(worker)
    shadow = ShadowWeights(parse_rule(AVERAGES["swa"]), dtype=torch.float64)
    for step, seed in ((20, 20), (30, 130), (40, 140)):
        shadow.fold(random_weights(seed), step=step)
    assert same_bits(served_weights(store, run.run_id, "swa"), shadow.value())


def test_a_rewind_with_nothing_new_is_published() -> None:
    """Even before the new branch has a checkpoint, the newest generation stops naming the old one."""
    store = MemoryStore()
    run = HandmadeRun(store, averages=AVERAGES)
    worker = averager(store)
    first = run.checkpoint(20, random_weights(20))
    run.checkpoint(30, random_weights(30))
    run_until_idle(worker)
    run.log.append(AttemptFailed(reason="worker_died"))
    run.start_attempt(resumed_from=first.seq)
    run_until_idle(worker)
    assert newest(run, "swa").folded == [first.seq]


def test_a_damaged_shadow_is_rebuilt_from_older_generations() -> None:
    """A shadow blob that rots is noticed by its digest; the folds since are replayed from the checkpoints."""
    store = MemoryStore()
    run = HandmadeRun(store, averages=AVERAGES)
    for step in (20, 30):
        run.checkpoint(step, random_weights(step))
        run_until_idle(averager(store))
    shadow = newest(run, "swa").shadow
    assert shadow is not None
    store.put(shadow.key, b"rotten")
    run.checkpoint(40, random_weights(40))
    run.finish()
    run_until_idle(averager(store))
    assert newest(run, "swa").coefficients.keys() == {20, 30, 40}


def test_72_failed_calibration_is_recorded_and_the_weights_are_served() -> None:
    """72: the assessment says `calibration_failed`; the average is published with averaged statistics."""
    store = MemoryStore()
    run = finished_run(store)
    failed = Assessment(batchnorm=BatchNormSummary(status="failed", code="calibration_failed", message="no data"))
    run_until_idle(averager(store, assessor=ScriptedAssessor(failed)))
    assert newest_assessment(store, run.run_id, "swa").assessment.batchnorm.code == "calibration_failed"
    assert served_weights(store, run.run_id, "swa").keys() == random_weights(0).keys()


def test_the_best_generation_is_pointed_to() -> None:
    """Each assessment names the generation with the lowest held-out loss so far, the newer one of equals."""
    store = MemoryStore()
    run = HandmadeRun(store, averages={"swa": "swa"})
    best = []
    for step, loss in zip((10, 20, 30, 40), (1.0, 0.5, 0.7, 0.5), strict=True):
        run.checkpoint(step, random_weights(step))
        run_until_idle(averager(store, assessor=ScriptedAssessor(assessment_of(raw=1.0, averaged=loss))))
        best.append(newest_assessment(store, run.run_id, "swa").best)
    assert best == [1, 2, 2, 4]


class PartlyAway(MemoryStore):
    """A store that cannot list the folders under one prefix."""

    lost = "nothing"

    def list(self, prefix: str, start_after: str = "", *, delimiter: str | None = None) -> Iterator[ObjectInfo]:
        """List, unless the folder is lost."""
        if prefix.startswith(self.lost):
            raise StoreUnavailableError(f"{prefix} is away (on purpose)")
        return super().list(prefix, start_after=start_after, delimiter=delimiter)


def test_a_run_that_cannot_be_read_stops_no_other() -> None:
    """The store failing for the first run alone, the second one is folded to its end."""
    store = PartlyAway()
    stuck, sound = sorted((finished_run(store) for _ in range(2)), key=lambda run: run.run_id)
    store.lost = layout.log_prefix(stuck.run_id)
    worker = averager(store)
    for _ in range(50):
        with contextlib.suppress(StoreUnavailableError):
            worker.tick()
    sound.log.refresh()
    assert sound.log.state is RunState.SUCCEEDED


def test_assessing_is_rationed_while_training() -> None:
    """While checkpoints keep coming within the interval, one assessment serves; the end has its own."""
    store = MemoryStore()
    run = HandmadeRun(store, averages=AVERAGES)
    assessor = ScriptedAssessor()
    worker = averager(store, assessor=assessor)
    for step in STEPS:
        run.checkpoint(step, random_weights(step))
        run_until_idle(worker)
    assert assessor.num_jobs == 1
    run.finish()
    run_until_idle(worker)
    assert assessor.num_jobs == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_f21_one_value_that_is_not_finite_costs_one_checkpoint(value: float) -> None:
    """F21: NaN or infinity at one step: that checkpoint is rejected by name, the average is that of the others."""
    store = MemoryStore()
    run = HandmadeRun(store, averages=AVERAGES)
    weights = {step: random_weights(step) for step in STEPS}
    weights[30]["conv.weight"][1, 2, 0, 1] = value
    for step in STEPS:
        run.checkpoint(step, weights[step])
    run.finish()

    run_until_idle(averager(store))

    for name, rule in AVERAGES.items():
        shadow = ShadowWeights(parse_rule(rule), dtype=torch.float64)
        for step in STEPS:
            if step != 30:
                shadow.fold(weights[step], step=step)
        assert [(aside.step, aside.code) for aside in newest(run, name).rejected] == [(30, "not_finite")]
        assert same_bits(served_weights(store, run.run_id, name), shadow.value())
