"""Turns snapshots of the bucket into the API's resources. Pure: no store, no clock, no HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.api.schemas import (
    AveragePreview,
    AverageResource,
    CheckpointResource,
    EvaluationSet,
    Prediction,
    Reason,
    RebuiltFrom,
    RunResource,
    Weights,
)
from services.recipes import registry
from wa_core import layout
from wa_core.averaging.rules import SwaRule, parse_run_rule
from wa_core.averaging.windows import WindowRule
from wa_core.catalog.catch_up import Replay, plan_catch_up
from wa_core.catalog.history import lineage
from wa_core.errors import InvalidInputError
from wa_core.records import (
    NO_RECIPE,
    AttemptFailed,
    AveragingState,
    CheckpointCommitted,
    Failed,
    RunState,
    TrainingFinished,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from services.api.state.snapshots import AverageSnapshot, RunSnapshot
    from wa_core.averaging.rules import AnyRule
    from wa_core.catalog.rebuild import Holdings, Rebuild
    from wa_core.records import (
        Assessment,
        AssessmentRecord,
        AverageManifest,
        AverageRequest,
        Entry,
        Evaluation,
        FileRef,
        Heartbeat,
    )

#: Rates that differ by more than this factor are of different phases.
RATE_PHASE = 1.1

WEIGHTS_FILES = {"weights.safetensors": layout.MODEL_FILE, "weights.pt": layout.PICKLE_FILE}


def run_resource(run: RunSnapshot) -> RunResource:
    """A run as the API shows it."""
    request = run.spec.request
    beat = _current_beat(run)
    step, metrics = _newest_step(run, beat)
    return RunResource(
        run_id=run.spec.run_id,
        state=_shown_state(run, beat),
        desired_state=run.desired_state,
        averaging_state=averaging_state(run),
        reason=_reason(run),
        trainer=run.spec.trainer,
        recipe=None if request.recipe == NO_RECIPE else request.recipe,
        package=request.package,
        config=request.config,
        scaling=request.scaling,
        checkpoint=request.checkpoint,
        training=request.training,
        averages=run.wanted,
        labels=request.labels,
        priority=request.priority,
        max_failures=request.max_failures,
        deadlines=request.deadlines,
        owner=run.spec.owner,
        seed=request.seed,
        step=step,
        total_steps=_total_steps(run, beat),
        eta_s=_eta_s(run, beat),
        attempt=run.attempt,
        metrics=metrics,
        created_at=run.spec.created_at,
        updated_at=_updated_at(run, beat),
    )


def averaging_state(run: RunSnapshot) -> AveragingState:
    """What the averaging of a run is doing: the least finished of its averages at work decides."""
    if not run.averages:
        return AveragingState.PUBLISHED
    if run.stall is not None:
        return AveragingState.STALLED
    states = {_average_state(average, run) for average in run.averages}
    order = (AveragingState.FOLDING, AveragingState.ASSESSING, AveragingState.WAITING, AveragingState.PUBLISHED)
    return next(state for state in order if state in states)


def is_averaging_due(run: RunSnapshot) -> bool:
    """Whether there is something for an averager to do."""
    at_work = {AveragingState.FOLDING, AveragingState.ASSESSING}
    return any(
        behind(average.newest, run.lineage) or _average_state(average, run) in at_work for average in run.averages
    )


def _average_state(average: AverageSnapshot, run: RunSnapshot) -> AveragingState:
    newest = average.newest
    if newest is None or not newest.folded:
        # Of a run that has ended, what counts none of the checkpoints waits for nothing.
        is_over = run.state.is_terminal and not behind(newest, run.lineage)
        return AveragingState.PUBLISHED if is_over else AveragingState.WAITING
    surviving = {checkpoint.seq for checkpoint in run.lineage}
    if behind(newest, run.lineage) or not surviving.issuperset(newest.folded):
        return AveragingState.FOLDING
    is_assessed = average.served is not None and average.served.generation == newest.generation
    return AveragingState.PUBLISHED if is_assessed else AveragingState.ASSESSING


def behind(manifest: AverageManifest | None, checkpoints: Sequence[CheckpointCommitted]) -> int:
    """How many surviving checkpoints an average has not looked at yet."""
    cursor = manifest.cursor if manifest else 0
    return sum(checkpoint.seq > cursor for checkpoint in checkpoints)


def average_resource(
    run_id: str,
    wanted: AverageRequest,
    *,
    shown: AverageManifest | None,
    served: AssessmentRecord | None,
    best: int | None,
    checkpoints: Sequence[CheckpointCommitted],
) -> AverageResource:
    """An average as the API shows it.

    Args:
        run_id: its run.
        wanted: what was asked for.
        shown: the generation to describe, None before the first.
        served: the assessment whose weights and numbers are out, None before the first.
        best: the best measured generation, None before any.
        checkpoints: the run's surviving checkpoints.
    """
    assessment = served.assessment if served else None
    return AverageResource(
        name=wanted.name,
        rule=wanted.rule,
        generation=shown.generation if shown else None,
        n_averaged=shown.n_averaged if shown else 0,
        first_step=shown.first_step if shown else None,
        last_step=shown.last_step if shown else None,
        behind=behind(shown, checkpoints),
        coefficients=shown.coefficients if shown else {},
        evaluation=evaluation_set(assessment),
        batchnorm=assessment.batchnorm if assessment else None,
        layers=assessment.layers if assessment else [],
        rejected=shown.rejected if shown else [],
        skipped=shown.skipped if shown else [],
        weights=_weights(run_id, served),
        published_generation=served.generation if served else None,
        best_generation=best,
        rebuilt=_rebuilt(shown),
        warnings=_warnings(wanted.rule, shown, checkpoints),
    )


def average_resources(run: RunSnapshot) -> list[AverageResource]:
    """A run's averages, in the order in which they were asked for."""
    return [
        average_resource(
            run.spec.run_id,
            wanted,
            shown=average.newest,
            served=average.served,
            best=average.served.best if average.served else None,
            checkpoints=run.lineage,
        )
        for wanted, average in zip(run.wanted, run.averages, strict=True)
    ]


def prediction_resource(plan: Replay | Rebuild) -> Prediction:
    """How an average that is added catches up, as the API shows it."""
    return Prediction(
        how="replay" if isinstance(plan, Replay) else "rebuild",
        profile_error=plan.profile_error,
        noise_gain=plan.noise_gain,
        reads=len(plan.files),
        read_bytes=plan.read_bytes,
    )


def preview_resource(held: Holdings, rule: AnyRule) -> AveragePreview:
    """What an average by `rule` would be, as the API shows it."""
    prediction, reason = None, None
    try:
        prediction = prediction_resource(plan_catch_up(held, rule))
    except InvalidInputError as error:
        reason = Reason(code=error.code, message=error.message)
    return AveragePreview(
        rule=rule.spelling,
        coefficients=rule.coefficients([entry.step for entry in held.sound() if rule.counts(entry.step)]),
        prediction=prediction,
        reason=reason,
    )


def checkpoint_resources(entries: Sequence[Entry]) -> list[CheckpointResource]:
    """Every checkpoint in a run's log, in order, those of abandoned branches included."""
    surviving = {checkpoint.seq for checkpoint in lineage(entries)}
    return [
        _checkpoint(entry, is_abandoned=entry.seq not in surviving)
        for entry in entries
        if isinstance(entry, CheckpointCommitted)
    ]


def _checkpoint(entry: CheckpointCommitted, *, is_abandoned: bool) -> CheckpointResource:
    weights = entry.files.get(layout.MODEL_FILE)
    return CheckpointResource(
        seq=entry.seq,
        step=entry.step,
        epoch=entry.epoch,
        attempt=entry.attempt,
        lr=entry.lr,
        metrics=entry.metrics,
        size_bytes=sum(file.size_bytes for file in entry.files.values()),
        sha256=weights.sha256 if weights else None,
        is_abandoned=is_abandoned,
        created_at=entry.at,
    )


def _warnings(rule: str, shown: AverageManifest | None, checkpoints: Sequence[CheckpointCommitted]) -> list[str]:
    """A plain mean is of weights around one optimum; those of other rates are elsewhere, or more scattered."""
    try:
        is_plain_mean = isinstance(parse_run_rule(rule), SwaRule | WindowRule)
    except InvalidInputError:
        return []  # submitted to a version that knew this rule
    if not is_plain_mean or shown is None:
        return []
    steps = shown.coefficients
    rates = [checkpoint.lr for checkpoint in checkpoints if checkpoint.lr and checkpoint.step in steps]
    if not rates or max(rates) <= RATE_PHASE * min(rates):
        return []
    phases = f"spans learning-rate phases: from {min(rates):.3g} to {max(rates):.3g}"
    return [f"{phases}; begin it later (start_step), or keep the rate constant (training.lr_schedule)"]


def _rebuilt(shown: AverageManifest | None) -> RebuiltFrom | None:
    if shown is None or shown.rebuilt is None:
        return None
    found = shown.rebuilt
    return RebuiltFrom(num_parts=len(found.parts), profile_error=found.profile_error, noise_gain=found.noise_gain)


def evaluation_set(assessment: Assessment | None) -> EvaluationSet:
    """How a generation measures, as the API shows it; empty before it was assessed."""
    if assessment is None:
        return EvaluationSet()
    return EvaluationSet(
        raw=_flat(assessment.raw),
        averaged=_flat(assessment.averaged),
        before_recalibration=_flat(assessment.before_recalibration),
        comparison=assessment.comparison,
        won=assessment.comparison.won if assessment.comparison else None,
    )


def _weights(run_id: str, served: AssessmentRecord | None) -> Weights | None:
    if served is None or layout.MODEL_FILE not in served.files:
        return None
    file: FileRef = served.files[layout.MODEL_FILE]
    path = f"/v1/runs/{run_id}/averages/{served.name}/weights.safetensors?generation={served.generation}"
    return Weights(sha256=file.sha256, size_bytes=file.size_bytes, url=path)


def _flat(evaluation: Evaluation | None) -> dict[str, int | float] | None:
    return None if evaluation is None else evaluation.metrics | {"step": evaluation.step}


def _current_beat(run: RunSnapshot) -> Heartbeat | None:
    """The trainer's heartbeat, unless it is an older attempt's."""
    return run.heartbeat if run.heartbeat and run.heartbeat.attempt == run.attempt else None


def _shown_state(run: RunSnapshot, beat: Heartbeat | None) -> RunState:
    """A run that steps is running, even before its first checkpoint says so in the log."""
    is_stepping = beat is not None and (beat.step or 0) >= 1
    return RunState.RUNNING if run.state is RunState.STARTING and is_stepping else run.state


def _newest_step(run: RunSnapshot, beat: Heartbeat | None) -> tuple[int, dict[str, float]]:
    told: list[tuple[int, dict[str, float]]] = [(0, {})]
    if run.lineage:
        told.append((run.lineage[-1].step, run.lineage[-1].metrics))
    told += [(entry.step, entry.metrics) for entry in run.entries if isinstance(entry, TrainingFinished)][-1:]
    if beat is not None:
        told.append((beat.step or 0, beat.metrics))
    step = max(at for at, _ in told)
    return step, next((metrics for _, metrics in sorted(told, key=lambda pair: -pair[0]) if metrics), {})


def _reason(run: RunSnapshot) -> Reason | None:
    if run.waiting is not None and run.waiting.reason and run.waiting.attempt == run.attempt:
        return Reason(code=run.waiting.reason, message=run.waiting.detail)
    if run.state not in {RunState.FAILED, RunState.RECOVERING}:
        return Reason(code=run.stall.code, message=run.stall.message) if run.stall else None
    failures = (entry for entry in reversed(run.entries) if isinstance(entry, AttemptFailed | Failed))
    failure = next(failures, None)
    return Reason(code=failure.reason, message=failure.message) if failure else None


def _eta_s(run: RunSnapshot, beat: Heartbeat | None) -> float | None:
    """What is left at the pace of the attempt, from its last sign of life on."""
    if beat is None or _shown_state(run, beat) is not RunState.RUNNING:
        return None
    if not beat.steps_per_s or beat.total_steps is None:
        return None
    return round(max(0, beat.total_steps - (beat.step or 0)) / beat.steps_per_s, 1)


def _total_steps(run: RunSnapshot, beat: Heartbeat | None) -> int | None:
    """What training came to, or has said, or what can be told beforehand: not for the recipe of a package."""
    if run.lineage and run.lineage[-1].is_last:
        return run.lineage[-1].step
    if beat and beat.total_steps:
        return beat.total_steps
    request = run.spec.request
    try:
        return registry.total_steps(request.recipe, request.config) if request.package is None else None
    except InvalidInputError:
        return None  # submitted to a version that knew this recipe


def _updated_at(run: RunSnapshot, beat: Heartbeat | None) -> datetime:
    times = [run.spec.created_at, *(entry.at for entry in run.entries[-1:] if entry.at)]
    return max([*times, beat.at] if beat else times)
