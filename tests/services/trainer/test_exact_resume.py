"""Killed at random and resumed: training and averaging end with the bits of a run that nothing disturbed."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import pytest

from support.averaging import averager, run_until_idle, same_bits, served_weights
from support.training import (
    differing_tensors,
    digits_request,
    log_of,
    start_attempt,
    start_gloo_workers,
    submit_run,
    train_with_gloo,
    weights_of,
)
from wa_core.catalog.averages import Generations
from wa_core.records import ConstantRate, CyclicalRate, EarlyStop, RunRequest, TrainingFinished, TrainingOptions
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from pathlib import Path

NUM_KILLS = 10
AVERAGES = {"swa": "swa:start_step=6", "ema": "ema:half_life=10", "window": "window:last=4"}
PLAIN = TrainingOptions()
FLOAT16 = TrainingOptions(
    precision="float16",
    clip_norm=1.0,
    lr_schedule=CyclicalRate(kind="cyclical", lr_max=0.1, lr_min=0.01, cycle_steps=3, start_step=4),
)
EVERYTHING = TrainingOptions(
    precision="bf16",
    accumulate_batches=3,
    clip_norm=0.5,
    deterministic=True,
    evaluate_every_steps=3,
    early_stop=EarlyStop(patience=6, min_delta=0.01),
    tensorboard=True,
    lr_schedule=ConstantRate(kind="constant", lr=0.02, start_step=9, anneal_steps=20),
)


def request(training: TrainingOptions) -> RunRequest:
    """Two workers, 44 steps."""
    return digits_request(num_workers=2, every_steps=2, epochs=4, training=training, averages=AVERAGES)


def test_ten_kills_change_no_bit(tmp_path: Path) -> None:
    """F15, F17: ten SIGKILLs of workers at random moments leave raw weights and all averages as they would be."""
    undisturbed = finished_run(tmp_path / "undisturbed", EVERYTHING, kills=[])
    killed = finished_run(tmp_path / "killed", EVERYTHING, kills=kill_plan(seed=5))

    check_same(tmp_path, undisturbed, killed)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("training", [PLAIN, FLOAT16, EVERYTHING], ids=["plain", "float16", "everything"])
def test_many_kills_change_no_bit(tmp_path: Path, training: TrainingOptions, seed: int) -> None:
    """F15, F17, at length: other kills each time; also without options, and in float16 with cycles."""
    undisturbed = finished_run(tmp_path / "undisturbed", training, kills=[])
    killed = finished_run(tmp_path / "killed", training, kills=kill_plan(seed=seed))

    check_same(tmp_path, undisturbed, killed)


def kill_plan(*, seed: int) -> list[Kill]:
    """Ten kills drawn from `seed`."""
    rng = random.Random(seed)
    return [Kill(rng) for _ in range(NUM_KILLS)]


class Kill:
    """Which rank to kill, after how many new checkpoints and how much longer, and where to go on from."""

    def __init__(self, rng: random.Random) -> None:
        self.rank = rng.randrange(2)
        self.num_checkpoints = rng.randrange(3)
        self.delay_s = rng.uniform(0.0, 0.1)
        self.num_back = rng.choice([0, 0, 0, 1, 3])


def finished_run(folder: Path, training: TrainingOptions, *, kills: list[Kill]) -> str:
    """Train to the end through `kills`, with an averager at work all the while, and return the run's id."""
    store = LocalStore(folder)
    run_id = submit_run(store, request(training))
    folding = averager(store)
    resumed_from = None
    for kill in kills:
        attempt = start_attempt(store, run_id, resumed_from=resumed_from)
        _train_until_killed(folder, run_id, attempt, kill)
        run_until_idle(folding)
        survivors = log_of(store, run_id).lineage[: -kill.num_back or None]
        resumed_from = survivors[-1].seq if survivors else None
    attempt = start_attempt(store, run_id, resumed_from=resumed_from)
    train_with_gloo(store, run_id, attempt=attempt, world_size=2)
    log_of(store, run_id).append(TrainingFinished(step=44), attempt=attempt)  # as the driver does
    run_until_idle(folding)
    return run_id


def _train_until_killed(folder: Path, run_id: str, attempt: int, kill: Kill) -> None:
    store = LocalStore(folder)
    workers = start_gloo_workers(store, run_id, attempt=attempt, world_size=2)
    try:
        deadline = time.monotonic() + 120
        while _num_committed(store, run_id, attempt) < kill.num_checkpoints and all(
            worker.is_alive() for worker in workers
        ):
            assert time.monotonic() < deadline, "training does not get on"
            time.sleep(0.02)
        time.sleep(kill.delay_s)  # not to wait for anything: the moment of the kill is what is random
        workers[kill.rank].kill()
        if kill.num_checkpoints:  # before they have met, the one left would wait for long; Ray ends it then
            for worker in workers:
                worker.join(60)
            assert not any(worker.is_alive() for worker in workers), "a worker outlives its peer"
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _num_committed(store: LocalStore, run_id: str, attempt: int) -> int:
    return sum(entry.attempt == attempt for entry in log_of(store, run_id).lineage)


def check_same(folder: Path, undisturbed: str, killed: str) -> None:
    """Both runs took the same steps, and hold the same bits: raw weights and averages."""
    runs = [(LocalStore(folder / "undisturbed"), undisturbed), (LocalStore(folder / "killed"), killed)]
    ends = [log_of(*run).lineage for run in runs]
    assert [entry.step for entry in ends[0]] == [entry.step for entry in ends[1]]
    assert [lineage[-1].is_last for lineage in ends] == [True, True]
    assert ends[0][-1].metrics == ends[1][-1].metrics
    raw = [weights_of(store, lineage[-1]) for (store, _), lineage in zip(runs, ends, strict=True)]
    assert differing_tensors(*raw) == []
    for name in AVERAGES:
        manifests = [Generations(*run, name).newest() for run in runs]
        assert manifests[0] is not None
        assert manifests[1] is not None
        assert manifests[0].coefficients == manifests[1].coefficients
        assert same_bits(*(served_weights(*run, name) for run in runs))
