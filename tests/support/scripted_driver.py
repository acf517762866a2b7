"""A stand-in for the training driver: does what the test's script says, attempt by attempt.

``scripted_driver.py FOLDER VERBS …``: VERBS is a comma-separated list, one per attempt (the last one repeats).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from services.trainer.failure import Failure
from wa_core import layout
from wa_core.catalog.runs import RunLog
from wa_core.clock import SystemClock
from wa_core.errors import WeightAveragingError
from wa_core.records import CheckpointCommitted, FileRef, Heartbeat, RunState, TrainingFinished
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from services.trainer.job import TrainingJob

TOTAL_STEPS = 40
EVERY_STEPS = 5
STEP_S = 0.02
HELD_AT = 22
_COMMITS_IN = frozenset({RunState.STARTING, RunState.RUNNING, RunState.PAUSING})


@dataclass(frozen=True)
class Script:
    """What a verb knows: the bucket, the run's log, and which attempt it is."""

    store: LocalStore
    log: RunLog
    attempt: int

    def save(self, step: int) -> None:
        """Commit a checkpoint."""
        prefix = layout.checkpoint_prefix(
            self.log.run_id, attempt=self.attempt, step=step, nonce=layout.new_nonce()
        )
        ref = FileRef(key=prefix + layout.MODEL_FILE, size_bytes=0, sha256="0" * 64)
        self.store.put(ref.key, b"")
        entry = CheckpointCommitted(
            step=step,
            files={layout.MODEL_FILE: ref},
            spec_digest="0" * 64,
            is_last=step == TOTAL_STEPS,
        )
        self.log.append(entry, attempt=self.attempt, expect=_COMMITS_IN)

    def beat(self, step: int) -> None:
        """Show how far training has come."""
        beat = Heartbeat(who="trainer", at=SystemClock().now(), attempt=self.attempt, step=step)
        self.store.put(layout.heartbeat(self.log.run_id, "trainer"), beat.model_dump_json().encode())


def finish(script: Script) -> int:
    """Train to the end."""
    script.log.append(TrainingFinished(step=10), attempt=script.attempt)
    return 0


def train(script: Script, *, held_at: int = TOTAL_STEPS) -> int:
    """Step as the real loop does, with checkpoints and an eye on the log; end as the real driver does.

    At `held_at` it takes no further step until it is stopped.
    """
    from services.trainer.driver import Attempt, _die_with, run_attempt  # takes long, and only this verb needs it
    from services.trainer.watch import RunWatch

    _die_with(os.getppid())

    def step_on(_job: TrainingJob) -> None:
        watch = RunWatch(script.store, script.log.run_id, attempt=script.attempt, clock=SystemClock())
        starts = [entry for entry in script.log.entries if entry.kind == "attempt_started"]
        step = next((e.step for e in script.log.lineage if e.seq == starts[-1].resumed_from), 0)
        while step < TOTAL_STEPS and not watch.is_stop_wanted:
            time.sleep(STEP_S)
            has_moved = step < held_at
            step += has_moved
            script.beat(step)
            watch.look()
            if (has_moved and step % EVERY_STEPS == 0) or watch.is_stop_wanted:
                watch.check_fence()
                script.save(step)

    attempt = Attempt(script.log.run_id, script.attempt)
    run_attempt(attempt, store=script.store, clock=SystemClock(), train=step_on)
    return 0


def save_then_die(script: Script) -> int:
    """Commit a checkpoint, then die as if killed."""
    script.save(script.attempt)
    os.kill(os.getpid(), signal.SIGKILL)
    return 1


def kill_runner(_script: Script) -> int:
    """Take the runner down, as a run that eats a machine's memory does."""
    os.kill(os.getppid(), signal.SIGKILL)
    return 1


def stall(script: Script) -> int:
    """Take some steps, then none."""
    script.beat(3)
    return _hang()


def hang(_script: Script) -> int:
    """Wait for SIGINT, and end by it."""
    return _hang()


def hang_deaf(_script: Script) -> int:
    """Wait for SIGKILL."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return _hang()


def hang_half_deaf(_script: Script) -> int:
    """Wait for SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return _hang()


def _hang() -> int:
    """Do nothing for as long as the runner lives."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.1)
    return 1


VERBS = {
    "finish": finish,
    "train": train,
    "train-half": partial(train, held_at=HELD_AT),
    "save-then-die": save_then_die,
    "kill-runner": kill_runner,
    "stall": stall,
    "hang": hang,
    "hang-deaf": hang_deaf,
    "hang-half-deaf": hang_half_deaf,
}


def main() -> int:
    """Do the verb of this attempt; a verb that is none is the reason of a failure."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a script ignore it
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("verbs")
    parser.add_argument("--run-id")
    parser.add_argument("--attempt", type=int)
    parser.add_argument("--result", type=Path)
    parser.add_argument("--parent-pid", type=int)
    options = parser.parse_args()
    verbs = options.verbs.split(",")
    verb = verbs[min(options.attempt, len(verbs)) - 1]
    if verb not in VERBS:
        Failure(reason=verb, message="as the test wanted").leave(options.result)
        return 1
    store = LocalStore(options.folder)
    log = RunLog(store, options.run_id, clock=SystemClock())
    log.refresh()
    try:
        return VERBS[verb](Script(store, log, options.attempt))
    except (WeightAveragingError, KeyboardInterrupt) as error:
        Failure.of(error).leave(options.result)
        return 1


if __name__ == "__main__":
    sys.exit(main())
