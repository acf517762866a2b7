"""Many runs at once, with everything that can happen to them happening at random; afterwards nothing is left."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fastapi.testclient import TestClient

from services.api.app import create_app
from support.api import submission
from support.descendants import descendants
from support.patience import eventually
from support.scripted_driver import TOTAL_STEPS
from support.scripted_runner import ScriptedRunners
from support.training import log_of
from wa_core.catalog.runs import list_queue
from wa_core.records import AttemptStarted, RunState
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

NUM_RUNS = 50
OVER = {RunState.FINALIZING, RunState.CANCELLED}


class Churn:
    """What happens to runs and their processes, drawn from a seed."""

    def __init__(self, api: TestClient, runners: ScriptedRunners, *, seed: int) -> None:
        self.api = api
        self.runners = runners
        self.draw = random.Random(seed)
        self.run_ids: list[str] = []
        self.cancelled: set[str] = set()
        self.was_below: set[int] = set()
        self.runner: subprocess.Popen[bytes] = runners.start()

    def submit(self) -> None:
        """One more run."""
        body = submission(
            averages=[],
            scaling={"num_workers": self.draw.choice([1, 2, 3])},
            priority=self.draw.randrange(100),
            max_failures=100,
        )
        self.run_ids.append(self.api.post("/v1/runs", json=body).json()["run_id"])

    def ask(self) -> None:
        """A wish for some run; whether it can be met or not, the answer is no 5xx."""
        run_id = self.draw.choice(self.run_ids)
        wish, body = self.draw.choice(
            [
                ("pause", None),
                ("resume", None),
                ("resume", {"from_step": self.draw.randrange(TOTAL_STEPS)}),
                ("resume", {"lr_scale": 0.5, "skip_batches": 3}),
                ("cancel", None),
            ]
        )
        answer = self.api.post(f"/v1/runs/{run_id}:{wish}", json=body)
        assert answer.status_code in {202, 409, 422}, answer.text
        if wish == "cancel" and answer.status_code == 202:
            self.cancelled.add(run_id)

    def kill_a_driver(self) -> None:
        """SIGKILL of some driver."""
        below = [pid for pid, line in descendants(self.runner.pid).items() if "scripted_driver" in line]
        self.was_below.update(below)
        if below:
            with suppress(ProcessLookupError):
                os.kill(self.draw.choice(below), signal.SIGKILL)

    def kill_the_runner(self) -> None:
        """SIGKILL of the runner, and a new one."""
        self.was_below.update(descendants(self.runner.pid))
        self.runner.kill()
        self.runner.wait()
        self.runner = self.runners.start()

    def go_on(self, store: LocalStore) -> bool:
        """Resume what is paused; whether all runs have come to their end."""
        states = {run_id: log_of(store, run_id).state for run_id in self.run_ids}
        for run_id, state in states.items():
            if state is RunState.PAUSED:
                self.api.post(f"/v1/runs/{run_id}:resume")
        return set(states.values()) <= OVER


@pytest.mark.timeout(900)
def test_fifty_runs_in_disorder_leave_nothing_behind(tmp_path: Path) -> None:
    """F16, F17: 50 runs submitted, paused, rewound, cancelled and killed at random end as they should.

    Each trains to its last step or was cancelled; every path of checkpoints ascends; and no process, temporary
    folder or queue marker is left.
    """
    store = LocalStore(tmp_path / "bucket")
    with TestClient(create_app(store=store)) as api, ScriptedRunners(tmp_path, "train") as runners:
        churn = Churn(api, runners, seed=5)
        happenings: list[Callable[[], None]] = [churn.ask, churn.kill_a_driver]
        while len(churn.run_ids) < NUM_RUNS:
            churn.submit()
            churn.draw.choice(happenings)()
            churn.ask()
            if len(churn.run_ids) % 10 == 0:
                churn.kill_the_runner()
        eventually(lambda: churn.go_on(store), timeout_s=800, what="the end of all runs")
        churn.was_below.update(descendants(churn.runner.pid))
        assert runners.stop(churn.runner) == 0

        assert list(runners.temporary.iterdir()) == []
        eventually(lambda: not any(_is_driver(pid) for pid in churn.was_below), what="the end of all drivers")
    assert list(list_queue(store)) == []
    for run_id in churn.run_ids:
        _check(store, run_id, is_cancelled=run_id in churn.cancelled)
    assert len(churn.cancelled) < NUM_RUNS * 3 / 4  # whom a wish meets hangs on what happened until then


def _check(store: LocalStore, run_id: str, *, is_cancelled: bool) -> None:
    log = log_of(store, run_id)
    steps = [entry.step for entry in log.lineage]
    assert steps == sorted(set(steps))
    # A cancel may come too late, but nothing else is cancelled.
    assert is_cancelled or log.state is RunState.FINALIZING
    if log.state is RunState.FINALIZING:
        assert steps[-1] == TOTAL_STEPS
    attempts = [entry.attempt for entry in log.entries if isinstance(entry, AttemptStarted)]
    assert attempts == list(range(1, len(attempts) + 1))


def _is_driver(pid: int) -> bool:
    try:
        return b"scripted_driver" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
