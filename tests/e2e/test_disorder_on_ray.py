"""At length, on the embedded stack: many runs in disorder, and one that is killed at random again and again.

In parts of a few minutes: all of them are fifty runs and ten kills, and `-k "disorder and [3]"` is one.
"""

from __future__ import annotations

import random
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from services.client.errors import ApiError
from support.averaging import same_bits, served_weights
from support.descendants import descendants
from support.leftovers import check_nothing_is_left
from support.patience import eventually
from support.stack import kill, submission
from support.training import differing_tensors, log_of, weights_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.stack import RunningStack

pytestmark = [pytest.mark.soak, pytest.mark.timeout(4 * 3600)]

NUM_RUNS, NUM_KILLS = 5, 2  # in each part
OVER = {"succeeded", "failed", "cancelled"}
SIGNS = {"worker": ("ray", "RayTrainWorker"), "driver": ("runner", "services.trainer.driver")}
ROLES = ["worker", "worker", "driver", "runner"]
AVERAGES = [{"name": "swa", "rule": "swa:start_step=40"}, {"name": "ema", "rule": "ema:half_life=30"}]


def kill_a(stack: RunningStack, role: str) -> bool:
    """SIGKILL of a process by its role; whether there was one."""
    pids = stack.pids()
    above, sign = SIGNS.get(role, (role, ""))
    if above not in pids:
        return False  # killed a moment ago
    if not sign:
        kill(pids[role])
        return True
    found = next((pid for pid, line in descendants(pids[above]).items() if sign in line), None)
    if found is not None:
        with suppress(ProcessLookupError):
            kill(found)
    return found is not None


class Disorder:
    """What happens to runs and their processes, drawn from a seed."""

    def __init__(self, stack: RunningStack, *, seed: int) -> None:
        self.stack = stack
        self.draw = random.Random(seed)
        self.run_ids: list[str] = []

    def submit(self) -> None:
        """One more run of a second or two of training, of one worker or two."""
        request = submission(
            config={"epochs": self.draw.choice([2, 40])},
            scaling={"num_workers": self.draw.choice([1, 2])},
            averages=[{"name": "swa", "rule": "swa"}],
            priority=self.draw.randrange(100),
            max_failures=100,
        )
        with self.stack.client() as client:
            self.run_ids.append(client.submit(request)["run_id"])

    def ask(self) -> None:
        """A wish for some run, whether or not it can be met."""
        run_id = self.draw.choice(self.run_ids)
        with self.stack.client() as client, suppress(ApiError):
            getattr(client, self.draw.choice(["pause", "resume", "cancel"]))(run_id)

    def kill(self) -> None:
        """SIGKILL of some process."""
        kill_a(self.stack, self.draw.choice(["worker", "worker", "driver", "driver", "runner"]))

    def go_on(self) -> bool:
        """Resume what is paused; whether all runs have come to their end."""
        with self.stack.client() as client:
            states = {run_id: client.run(run_id)["state"] for run_id in self.run_ids}
            for run_id, state in states.items():
                if state == "paused":
                    with suppress(ApiError):
                        client.resume(run_id)
        return set(states.values()) <= OVER

    def happen(self) -> None:
        """Something happens at a random moment while some run trains or is about to."""
        happenings: list[Callable[[], None]] = [self.ask, self.kill, self.kill]
        self.stack_moves(self.draw.randrange(1, 4))
        self.draw.choice(happenings)()

    def stack_moves(self, num_entries: int) -> None:
        """Wait until so many more entries are in the logs of all runs, or all have ended."""
        before = self._num_entries()
        eventually(
            lambda: self._num_entries() >= before + num_entries or self.go_on(),
            timeout_s=180,
            what="anything at all",
        )

    def _num_entries(self) -> int:
        store = self.stack.store()
        return sum(len(log_of(store, run_id).entries) for run_id in self.run_ids)


@pytest.mark.parametrize("seed", range(10))
def test_runs_in_disorder_leave_nothing_on_ray(stack: RunningStack, seed: int) -> None:
    """F15, F16: runs submitted, cancelled, paused and killed at random all end, and nothing of them is left."""
    disorder = Disorder(stack, seed=seed)
    for _ in range(NUM_RUNS):
        disorder.submit()
        disorder.happen()
    eventually(disorder.go_on, timeout_s=120 * NUM_RUNS, what="the end of all runs")

    with stack.client() as client:
        runs = [client.run(run_id) for run_id in disorder.run_ids]
    assert {run["state"] for run in runs} <= {"succeeded", "cancelled"}, runs
    check_nothing_is_left(stack)


@pytest.fixture(scope="module")
def undisturbed(stack: RunningStack) -> str:
    """The run that nobody kills."""
    return trained(stack, moments=[])


@pytest.mark.parametrize("seed", range(5))
def test_kills_at_random_change_no_bit_on_ray(stack: RunningStack, undisturbed: str, seed: int) -> None:
    """F15, F16: two workers, killed at random points, end with the weights and averages of an undisturbed run."""
    draw = random.Random(seed)
    killed = trained(stack, moments=[(draw.randrange(4), draw.choice(ROLES)) for _ in range(NUM_KILLS)])

    store = stack.store()
    runs = [log_of(store, run_id).lineage for run_id in (undisturbed, killed)]
    assert [entry.step for entry in runs[0]] == [entry.step for entry in runs[1]]
    assert differing_tensors(*(weights_of(store, lineage[-1]) for lineage in runs)) == []
    for average in AVERAGES:
        assert same_bits(*(served_weights(store, run_id, average["name"]) for run_id in (undisturbed, killed)))
    check_nothing_is_left(stack)


def trained(stack: RunningStack, *, moments: list[tuple[int, str]]) -> str:
    """A run that has succeeded through kills, each after so many new checkpoints and of such a process."""
    request = submission(config={"epochs": 60}, averages=AVERAGES, max_failures=100)
    with stack.client() as client:
        run_id: str = client.submit(request)["run_id"]
    store = stack.store()
    for num_checkpoints, role in moments:
        before = len(log_of(store, run_id).lineage)
        eventually(
            lambda wanted=before + num_checkpoints: len(log_of(store, run_id).lineage) >= wanted,
            timeout_s=180,
            what="the next checkpoints",
        )
        eventually(lambda role=role: kill_a(stack, role), timeout_s=180, what=f"a {role}")
    with stack.client() as client:
        run = client.wait(run_id)
    assert run["state"] == "succeeded", run
    assert moments == [] or run["attempt"] > 1
    return run_id
