"""What an owner may ask of a run, and when: to end, to pause, to go on, to go back to an older step.

A wish is one entry in the run's log. A run that no attempt holds follows at once; one that trains does so at a
step boundary, as its trainer and its runner see to. Knows no HTTP but the refusals' codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.api.problems import HttpProblem
from wa_core import layout
from wa_core.catalog.checkpoints import sound_checkpoints
from wa_core.errors import AlreadyFinishedError, ConflictError
from wa_core.records import (
    Cancelled,
    CancelRequested,
    Marker,
    Paused,
    PauseRequested,
    ResumeRequested,
    RunState,
)

if TYPE_CHECKING:
    from wa_core.catalog.runs import RunLog
    from wa_core.records import Resumption, RunSpec
    from wa_core.store.base import ObjectStore

_WITHOUT_RUNNER = frozenset({RunState.QUEUED, RunState.PAUSED})
#: The states in which a run can be cancelled.
CANCELLABLE = frozenset(state for state in RunState if not state.is_terminal and state is not RunState.FINALIZING)
_HELD = frozenset({RunState.STARTING, RunState.RUNNING, RunState.RECOVERING})
_REWINDABLE = _HELD | _WITHOUT_RUNNER


def cancel(store: ObjectStore, spec: RunSpec, log: RunLog) -> None:
    """Ask for a run's end; one that no runner holds ends here and now.

    Raises:
        AlreadyFinishedError: the run has ended.
        ConflictError: its training is done; only its averages are being finished (`already_finalizing`).
    """
    _check_is_training(log, "cancel")
    if log.desired_state != "cancelled":
        log.append(CancelRequested(), expect=CANCELLABLE)
    try:
        log.append(Cancelled(), expect=_WITHOUT_RUNNER)
    except AlreadyFinishedError:
        return  # another cancel, or the runner, was quicker
    except ConflictError:
        return  # a runner holds it, and will end it at a step boundary
    store.delete(layout.queue_marker(spec.run_id, priority=spec.request.priority))


def pause(store: ObjectStore, spec: RunSpec, log: RunLog) -> None:
    """Ask for a pause; a run that waits pauses here and now, and one that pauses already goes on doing so.

    Raises:
        AlreadyFinishedError: the run has ended.
        ConflictError: its training is done (`already_finalizing`), or it is being cancelled (`being_cancelled`).
    """
    _check_is_training(log, "pause")
    _check_is_wanted(log)
    if log.state is RunState.QUEUED:
        try:
            log.append(Paused(), expect={RunState.QUEUED})  # one entry: a crash cannot leave half a pause
        except ConflictError:
            _check_is_wanted(log)  # a runner was quicker, so ask it; or somebody cancels
        else:
            store.delete(layout.queue_marker(spec.run_id, priority=spec.request.priority))
    if log.state not in {RunState.PAUSING, RunState.PAUSED}:
        log.append(PauseRequested(), expect=_HELD)


def resume(store: ObjectStore, spec: RunSpec, log: RunLog, wanted: Resumption) -> None:
    """Let a paused run go on; or any that can still train, with a step to go back to or another change.

    An attempt that trains meanwhile ends at a step boundary, and the next one grows from the newest kept
    checkpoint at or before the step.

    Raises:
        AlreadyFinishedError: the run has ended.
        ConflictError: its training is done (`already_finalizing`), it is being cancelled (`being_cancelled`), has
            not paused yet (`still_pausing`), or is not paused and nothing is to change (`not_paused`).
        HttpProblem: 422 `step_not_kept`, with the steps that are.
    """
    _check_is_training(log, "resume")
    _check_is_wanted(log)
    if log.state is RunState.PAUSING:
        raise ConflictError(
            f"run {log.run_id} is still pausing; resume it once it is paused", code="still_pausing"
        )
    if log.state is not RunState.PAUSED and not wanted.changes_something:
        raise _not_paused(log)
    from_step = None if wanted.from_step is None else _kept_step(store, log, wanted.from_step)
    # The marker comes first, so that no crash leaves a run that waits unseen; of a paused run it does nothing.
    marker = Marker(run_id=spec.run_id, at=spec.created_at).model_dump_json().encode()
    store.put(layout.queue_marker(spec.run_id, priority=spec.request.priority), marker)
    entry = ResumeRequested(from_step=from_step, lr_scale=wanted.lr_scale, skip_batches=wanted.skip_batches)
    try:
        log.append(entry, expect=_REWINDABLE if wanted.changes_something else {RunState.PAUSED})
    except AlreadyFinishedError:
        raise
    except ConflictError:
        raise _not_paused(log) from None


def _kept_step(store: ObjectStore, log: RunLog, from_step: int) -> int:
    """The step of the newest sound checkpoint at or before `from_step` whose files are there; 0 is the beginning.

    Raises:
        HttpProblem: 422 `step_not_kept`.
    """
    present = {info.key for info in store.list(layout.checkpoints_prefix(log.run_id))}
    kept = [
        entry.step
        for entry in sound_checkpoints(log.run_id, log.lineage)
        if present.issuperset(ref.key for ref in entry.files.values())
    ]
    before = [step for step in [0, *kept] if step <= from_step]
    if before[-1] == 0 and from_step > 0:
        detail = (
            f"no checkpoint of run {log.run_id} at or before step {from_step} is kept; kept are those of steps "
            f"{', '.join(map(str, kept[:50])) or 'none'}; 0 begins anew"
        )
        faults_found = [("from_step", detail)]
        extra = {"kept_steps": kept}
        raise HttpProblem(detail, status=422, code="step_not_kept", faults=faults_found, extra=extra)
    return before[-1]


def _check_is_training(log: RunLog, wish: str) -> None:
    if log.state.is_terminal:
        raise AlreadyFinishedError(f"run {log.run_id} is {log.state} already; there is nothing to {wish}")
    if log.state is RunState.FINALIZING:
        raise ConflictError(
            f"run {log.run_id} has finished training and is publishing its averages; there is nothing to {wish}",
            code="already_finalizing",
        )


def _check_is_wanted(log: RunLog) -> None:
    if log.desired_state == "cancelled":
        raise ConflictError(f"run {log.run_id} is being cancelled; submit a new run", code="being_cancelled")


def _not_paused(log: RunLog) -> ConflictError:
    return ConflictError(
        f"run {log.run_id} is {log.state}, so there is nothing to resume; give from_step to go back to a step",
        code="not_paused",
    )
