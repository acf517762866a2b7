"""Runs whose trainer is the user's own: made and begun by that trainer, and never claimed by a runner.

It knows the run log and the markers; no torch, and not what is trained. The invariant: such a run says so in its
spec, has no place in the queue, and is told to averagers like any other.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.catalog.checkpoints import sound_checkpoints
from wa_core.catalog.commit import patiently
from wa_core.catalog.runs import create_run, fetch_spec
from wa_core.errors import AlreadyFinishedError, ConflictError, InvalidInputError
from wa_core.records import (
    TRAINING,
    AttemptFailed,
    AttemptStarted,
    Cancelled,
    CheckpointCommitted,
    Failed,
    ResumeRequested,
    RunRequest,
    RunSpec,
    RunState,
)

if TYPE_CHECKING:
    from wa_core.catalog.runs import RunLog
    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

TRAINER_FAILED = "trainer_failed"
TRAINER_LOST = "trainer_lost"
INTERRUPTED = "interrupted"

# An interrupted or lost trainer is not the run's fault.
_COUNTED = frozenset({TRAINER_FAILED})
_BEGINS_IN = TRAINING | {RunState.QUEUED, RunState.PAUSED}


def register(store: ObjectStore, request: RunRequest, *, clock: Clock) -> RunSpec:
    """Create a run that its own trainer is about to train; `begin` starts its first attempt.

    Raises:
        TransientError: the store is away; nothing that counts was written, or all of it.
    """
    now = clock.now()
    spec = RunSpec(run_id=layout.new_run_id(now), created_at=now, trainer="own", request=request)
    patiently(lambda: create_run(store, spec, clock=clock))
    return spec


def begin(log: RunLog, *, from_step: int | None = None) -> CheckpointCommitted | None:
    """Start the next attempt, and return the checkpoint that it grows from: the newest, or that of `from_step`.

    An attempt that was under way is over from here on, and refused what it may still say.

    Raises:
        InvalidInputError: no sound checkpoint is as old as `from_step` (`no_such_step`).
        AlreadyFinishedError: the run has ended.
        ConflictError: its training is done.
    """
    patiently(log.refresh)
    sound = sound_checkpoints(log.run_id, log.lineage)
    wanted = [entry for entry in sound if from_step is None or entry.step <= from_step]
    if from_step is not None and not wanted:
        steps = ", ".join(str(entry.step) for entry in sound[:10]) or "none"
        raise InvalidInputError(
            f"no checkpoint is as old as step {from_step}; there are: {steps}", code="no_such_step"
        )
    if log.desired_state == "cancelled":
        log.append(Cancelled())
        raise AlreadyFinishedError(f"run {log.run_id} was cancelled by its owner, so it cannot go on")
    if log.state in TRAINING - {RunState.RECOVERING}:
        lost = AttemptFailed(reason=TRAINER_LOST, message="another attempt has taken over")
        log.append(lost, attempt=log.attempt, expect=TRAINING)
    if log.desired_state == "paused":
        log.append(ResumeRequested(from_step=from_step))
    source = wanted[-1] if wanted else None
    started = AttemptStarted(runner_id=_trainer_id(), resumed_from=source.seq if source else None)
    log.append(started, expect=_BEGINS_IN)
    return source


def fetch_own_spec(store: ObjectStore, run_id: str) -> RunSpec:
    """The spec of a run whose trainer is the user's own.

    Raises:
        RunNotFoundError: there is no such run.
        ConflictError: the service trains it (`not_own_run`).
    """
    spec = fetch_spec(store, run_id)
    if spec.trainer != "own":
        raise ConflictError(
            f"run {run_id} is trained by the service; it goes on by itself, or after a resume there",
            code="not_own_run",
        )
    return spec


def fail(log: RunLog, *, attempt: int, reason: str, message: str, max_failures: int) -> None:
    """Record that an attempt has failed, and the run with it once that has happened too often.

    Raises:
        ConflictError: the attempt was over already.
    """
    text = " ".join(message.split())[:500]
    log.append(AttemptFailed(reason=reason, message=text), attempt=attempt, expect=TRAINING)
    num_counted = sum(isinstance(entry, AttemptFailed) and entry.reason in _COUNTED for entry in log.entries)
    if reason in _COUNTED and num_counted > max_failures:
        log.append(Failed(reason=reason, message=text), attempt=attempt)


def _trainer_id() -> str:
    """Of no form that a runner takes for a runner's."""
    return f"own:{socket.gethostname()}:{os.getpid()}"
