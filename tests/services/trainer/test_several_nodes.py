"""A run on a Ray cluster of two nodes, one of which is lost: real raylets, runner, driver, DDP and averager."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from services.averager.scratch import Scratch
from services.averager.verify import verify
from support.averaging import averager, run_until_idle
from support.patience import eventually
from support.ray_nodes import RayNodes
from support.training import digits_request, log_of, submit_run
from wa_core.clock import SystemClock
from wa_core.records import AttemptStarted, RunState, Scaling
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

NODE = re.compile(r"rank (\d) of (\d): starting at step (\d+) .* of node (\w+)")
RULE = "ema:half_life=40"


@pytest.fixture
def nodes() -> Iterator[RayNodes]:
    """Two nodes of one processor each; the runner is beside the first."""
    with RayNodes(cpus_each=1) as nodes:
        nodes.add()
        yield nodes


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """The bucket."""
    return LocalStore(tmp_path)


@pytest.fixture
def _runner(tmp_path: Path, nodes: RayNodes) -> Iterator[None]:
    """A runner on the cluster."""
    settings = {"WA_STORE_URL": f"file://{tmp_path}", "WA_POLL_INTERVAL_S": "0.2"}
    process = subprocess.Popen(
        [sys.executable, "-m", "services.trainer"], env={**os.environ, **nodes.environment, **settings}
    )
    yield
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@pytest.mark.usefixtures("_runner")
def test_f15_an_elastic_run_outlives_one_of_its_two_nodes(nodes: RayNodes, store: LocalStore) -> None:
    """F15: with a worker on each node, SIGKILL of one raylet: the run ends with one worker, and exact averages."""
    request = digits_request(num_workers=2, every_steps=10, epochs=30, averages={"ema": RULE})
    scaling = Scaling(num_workers=2, min_workers=1)
    run_id = submit_run(store, request.model_copy(update={"scaling": scaling}))
    eventually(lambda: len(log_of(store, run_id).lineage) >= 3, timeout_s=120, what="training on two nodes")
    nodes.kill(1)
    eventually(lambda: has_ended(store, run_id), timeout_s=150, what="training on the node that is left")
    run_until_idle(averager(store))

    entries = log_of(store, run_id).entries
    starts = [entry for entry in entries if isinstance(entry, AttemptStarted)]
    assert entries[-1].state is RunState.SUCCEEDED, entries[-1]
    assert (starts[0].num_workers, starts[-1].num_workers) == (2, 1)
    assert starts[-1].resumed_from is not None
    check_places(store, run_id, last=starts[-1].attempt)
    with Scratch() as scratch:
        found = verify(store, run_id, "ema", clock=SystemClock(), scratch=scratch)
    assert found.steps == tuple(range(10, 331, 10))
    assert found.is_state_equal
    assert found.served_generation == found.generation


def check_places(store: LocalStore, run_id: str, *, last: int) -> None:
    """Two nodes trained at first, and one of them alone in the end, from where they had come to."""
    first = {places(store, run_id, attempt=1, rank=rank) for rank in (0, 1)}
    assert len({node for *_, node in first}) == 2
    rank, world_size, step, node = places(store, run_id, attempt=last, rank=0)
    assert (rank, world_size) == ("0", "1")
    assert int(step) >= 30
    assert node in {node for *_, node in first}


def places(store: LocalStore, run_id: str, *, attempt: int, rank: int) -> tuple[str, str, str, str]:
    """(rank, world size, step, node) as a worker's log begins."""
    keys = store.list(f"runs/{run_id}/logs/{attempt:04d}/{rank}/")
    text = b"".join(store.get(info.key) for info in keys).decode()
    found = NODE.search(text)
    assert found, text
    return found[1], found[2], found[3], found[4]


def has_ended(store: LocalStore, run_id: str) -> bool:
    """Whether training is over."""
    return log_of(store, run_id).state in {RunState.FINALIZING, RunState.FAILED}
