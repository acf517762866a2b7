"""One attempt in one process: `python -m services.trainer.driver`. Started by the runner, and dies with it.

It trains, then says in the run log how that ended: `training_finished`, `paused` or `cancelled`. It does not
decide what follows a failure; it leaves the reason in a file for the runner and exits with 1.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from services.runtime.lifecycle import Stop, stop_with_parent
from services.runtime.settings import Settings
from services.runtime.stores import open_store
from services.runtime.telemetry import configure_logging
from services.trainer.admission import scaling_of
from services.trainer.background import Background, Job
from services.trainer.failure import Failure
from services.trainer.job import TrainingJob, run_job
from services.trainer.logs import LogShipper
from wa_core.catalog.commit import patiently
from wa_core.catalog.runs import RunLog, fetch_spec
from wa_core.clock import Clock, SystemClock
from wa_core.errors import TransientError
from wa_core.records import Cancelled, Paused, RunState, TrainingFinished

if TYPE_CHECKING:
    from collections.abc import Callable

    from wa_core.store.base import ObjectStore

LOGS_INTERVAL_S = 2.0
_MAY_FINISH = frozenset({RunState.STARTING, RunState.RUNNING, RunState.PAUSING})


@dataclass(frozen=True, slots=True)
class Attempt:
    """Which attempt of which run this process is."""

    run_id: str
    number: int


def run_attempt(
    attempt: Attempt, *, store: ObjectStore, clock: Clock, train: Callable[[TrainingJob], None]
) -> None:
    """Train, then record how it ended. A run that nobody wants to train any more by then is not trained at all.

    Raises:
        FencedError: a newer attempt has taken over.
        TransientError: training ended before its last step although nobody asked for that.
        WeightAveragingError: training failed.
    """
    request = fetch_spec(store, attempt.run_id).request
    log = RunLog(store, attempt.run_id, clock=clock)
    patiently(log.refresh)
    if log.desired_state == "succeeded":  # bringing up workers only to stop them takes up to a minute
        train(TrainingJob(attempt.run_id, attempt.number, scaling_of(request, log.entries)))
        patiently(log.refresh)
    last = log.lineage[-1] if log.lineage else None
    if log.desired_state == "cancelled":
        log.append(Cancelled(), attempt=attempt.number)
    elif last is not None and last.is_last:
        entry = TrainingFinished(step=last.step, metrics=last.metrics)
        log.append(entry, attempt=attempt.number, expect=_MAY_FINISH)
    elif log.desired_state == "paused":
        log.append(Paused(), attempt=attempt.number, expect={RunState.PAUSING})
    else:
        raise TransientError(
            f"training ended at step {last.step if last else 0}, before its last one, without an error",
            code="stopped_early",
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the attempt that the command line names, and return the exit code."""
    options = _parse(arguments)
    _die_with(options.parent_pid)
    settings = Settings()
    about = {"run_id": options.run_id, "attempt": options.attempt}
    configure_logging("driver", log_format=settings.log_format, **about)
    store, clock = open_store(settings), SystemClock()
    attempt = Attempt(options.run_id, options.attempt)
    logs = LogShipper(store, attempt.run_id, attempt=attempt.number, rank="driver", clock=clock)
    with Background([Job(logs.flush, LOGS_INTERVAL_S)]):
        logs.line(f"attempt {attempt.number}: starting on Ray at {settings.ray_address or 'this machine'}")
        try:
            run_attempt(attempt, store=store, clock=clock, train=lambda job: run_job(job, settings))
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001  the process's outermost level
            failure = Failure.of(error)
            logs.line(f"attempt {attempt.number} failed ({failure.reason}): {failure.message}")
            failure.leave(options.result)
            return 1
        logs.line(f"attempt {attempt.number}: done")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m services.trainer.driver", description="Train one attempt.")
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True, help="where to leave the reason of a failure")
    parser.add_argument("--parent-pid", type=int, required=True, help="the runner; this process ends with it")
    return parser.parse_args(arguments)


def _die_with(parent_pid: int) -> None:
    """End this process and all of its group at once when the runner is gone: no orphan trains on."""
    parent_gone = Stop()
    stop_with_parent(parent_gone, parent_pid=parent_pid)

    def watch() -> None:
        while not parent_gone.wait(60.0):
            pass
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
