"""A stand-in for the training driver: does what the test's script says, attempt by attempt.

``scripted_driver.py FOLDER VERBS …``: VERBS is a comma-separated list, one per attempt (the last one repeats).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from services.trainer.failure import Failure
from wa_core import layout
from wa_core.catalog.runs import RunLog
from wa_core.clock import SystemClock
from wa_core.records import CheckpointCommitted, FileRef, TrainingFinished
from wa_core.store.local import LocalStore


def save(log: RunLog, attempt: int, *, step: int) -> None:
    """Commit a checkpoint."""
    prefix = layout.checkpoint_prefix(log.run_id, attempt=attempt, step=step, nonce=layout.new_nonce())
    ref = FileRef(key=prefix + layout.MODEL_FILE, size_bytes=0, sha256="0" * 64)
    log._store.put(ref.key, b"")
    log.append(
        CheckpointCommitted(step=step, files={layout.MODEL_FILE: ref}, spec_digest="0" * 64), attempt=attempt
    )


def finish(log: RunLog, attempt: int) -> int:
    """Train to the end."""
    log.append(TrainingFinished(step=10), attempt=attempt)
    return 0


def save_then_die(log: RunLog, attempt: int) -> int:
    """Commit a checkpoint, then die as if killed."""
    save(log, attempt, step=attempt)
    os.kill(os.getpid(), signal.SIGKILL)
    return 1


def hang(_log: RunLog, _attempt: int) -> int:
    """Wait for SIGINT, and end by it."""
    time.sleep(600)
    return 1


def hang_deaf(_log: RunLog, _attempt: int) -> int:
    """Wait for SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(600)
    return 1


VERBS = {"finish": finish, "save-then-die": save_then_die, "hang": hang, "hang-deaf": hang_deaf}


def main() -> int:
    """Do the verb of this attempt; a verb that is none is the reason of a failure."""
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
    log = RunLog(LocalStore(options.folder), options.run_id, clock=SystemClock())
    log.refresh()
    return VERBS[verb](log, options.attempt)


if __name__ == "__main__":
    sys.exit(main())
