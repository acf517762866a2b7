"""What a runner counts and times, for Prometheus. No run is a label, nor a reason that this code does not know."""

from __future__ import annotations

from collections import Counter as Tally
from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge, Histogram

from services.trainer.failure import REASONS
from wa_core.records import RunState

if TYPE_CHECKING:
    from collections.abc import Iterable

RUNS = Gauge("wa_runner_runs", "Runs that are not wholly done, of the whole bucket, by state.", ["state"])
RUNS_HELD = Gauge("wa_runner_runs_held", "Runs whose drivers this runner has started and watches.")
QUEUED = Gauge("wa_runner_queued_runs", "Runs that wait for an attempt, of the whole bucket.")
ATTEMPTS = Counter("wa_runner_attempts", "Attempts started.")
FAILED_ATTEMPTS = Counter(
    "wa_runner_failed_attempts", "Attempts of this runner, or taken over by it, that failed.", ["reason"]
)
RUNS_FAILED = Counter("wa_runner_failed_runs", "Runs that were given up.", ["reason"])
QUEUE_SECONDS = Histogram(
    "wa_runner_queue_seconds",
    "From the submission of a run, or the wish to resume it, to the start of its attempt.",
    buckets=(0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 14400, 86400),
)
STARTUP_SECONDS = Histogram(
    "wa_runner_startup_seconds",
    "From the start of an attempt's driver to the first sign of life of its training loop.",
    buckets=(1, 2.5, 5, 10, 15, 20, 30, 45, 60, 120, 300),
)


def known(reason: str) -> str:
    """The reason as a label: user code may raise with any code, and each would be a new time series."""
    return reason if reason in REASONS else "other"


def observe_runs(states: Iterable[RunState], *, num_queued: int, num_held: int) -> None:
    """Tell how many runs there are in each state that is not final, how many wait, and how many are held."""
    QUEUED.set(num_queued)
    RUNS_HELD.set(num_held)
    found = Tally(states)
    for state in RunState:
        if not state.is_terminal:
            RUNS.labels(state.value).set(found[state])
