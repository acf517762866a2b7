"""The training loop: DDP over any torch process group, exact in its recovery.

It knows no Ray: it runs as well alone, or under plain multi-process gloo. It keeps one invariant: the weights
after step n depend on the run's spec, the number of workers and n alone, whether or not training was interrupted
on the way (bit-identical on CPU). Every rank calls `train`; rank 0 alone writes checkpoints and metrics.
"""

from __future__ import annotations

import traceback
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from torch import distributed

from services.recipes.loader import load_recipe
from services.runtime import tracing
from services.trainer.background import Background, Job
from services.trainer.determinism import deterministic
from services.trainer.lead import Lead
from services.trainer.logs import LogShipper
from services.trainer.training import Training
from wa_core.catalog.commit import patiently
from wa_core.catalog.packages import unpack_package
from wa_core.catalog.runs import RunLog, fetch_spec
from wa_core.errors import FencedError, TransientError, UserCodeError, WeightAveragingError

if TYPE_CHECKING:
    from services.runtime.spans import Attributes
    from services.trainer.context import TrainContext
    from wa_core.recipe import Recipe
    from wa_core.records import RunRequest

LOGS_INTERVAL_S = 2.0


@dataclass(frozen=True, slots=True)
class TrainOutcome:
    """How far training came; `is_stopped` when it was asked to end before its last step.

    The last step is `total_steps`, or an earlier one at which the run's own `early_stop` has ended training.
    """

    step: int
    total_steps: int
    is_stopped: bool
    metrics: dict[str, float]


def train(context: TrainContext) -> TrainOutcome:
    """Train one attempt of a run to its end, or until it is stopped; every offered checkpoint is committed.

    Raises:
        FencedError: a newer attempt has taken over, or the run has ended.
        UserCodeError: the recipe raised; its traceback is in the rank's log.
        TransientError: another worker was lost (code ``peer_lost``), or the store stayed away.
        WeightAveragingError: as the error says.
    """
    about: Attributes = {
        "wa.run_id": context.run_id,
        "wa.attempt": context.attempt,
        "wa.rank": context.rank,
    }
    with tracing.span("train", parent=context.traceparent, attributes=about) as span:
        return _train(replace(context, traceparent=span.traceparent))


def _train(context: TrainContext) -> TrainOutcome:
    spec = fetch_spec(context.store, context.run_id)
    logs = LogShipper(
        context.store, context.run_id, attempt=context.attempt, rank=context.rank, clock=context.clock
    )
    with ExitStack() as stack:
        stack.enter_context(Background([Job(logs.flush, LOGS_INTERVAL_S)]))
        stack.enter_context(logs.capture())
        stack.enter_context(deterministic(spec.request.training.deterministic))
        try:
            recipe = _load(spec.request, context, stack)
            return _run(Training(context, spec, recipe, log=_fetch_log(context)), logs=logs)
        except WeightAveragingError as error:
            logs.line(f"stopped: {error.message}")
            raise
        except Exception as error:
            logs.write(traceback.format_exc())
            raise _explained(error) from error


def _load(request: RunRequest, context: TrainContext, stack: ExitStack) -> Recipe:
    """The run's recipe, from its package if it came with one, whose files are there until `stack` ends."""
    code = None
    if request.package is not None:
        folder = stack.enter_context(TemporaryDirectory(prefix="wa-code-", dir=context.scratch_dir))
        code = unpack_package(context.store, request.package, Path(folder))
    return load_recipe(request.recipe, request.config, seed=request.seed, code=code)


def _run(training: Training, *, logs: LogShipper) -> TrainOutcome:
    context = training.context
    logs.line(
        f"attempt {context.attempt}, rank {context.rank} of {context.world_size}: starting at step "
        f"{training.step} of {training.total_steps} on {context.device}"
        + (f" of node {context.node}" if context.node else "")
    )
    if context.rank != 0:
        return _steps(training, lead=None, logs=logs)
    with ExitStack() as stack:
        return _steps(training, lead=Lead(training, stack), logs=logs)


def _steps(training: Training, *, lead: Lead | None, logs: LogShipper) -> TrainOutcome:
    """Step until the end, or until all ranks agree to stop; then the last weights are kept as well."""
    metrics: dict[str, float] = {}
    is_stopped = False
    while not training.is_over and not is_stopped:
        metrics = training.advance()
        if lead is not None:
            metrics |= training.measure()
        is_stop_wanted = lead is not None and lead.watch.is_stop_wanted
        metrics["loss"], is_stopped = training.agree(metrics["loss"], is_stop_wanted=is_stop_wanted)
        if lead is None:
            continue
        lead.note(metrics)
        if is_stopped:
            lead.watch.check_fence()
        if training.is_checkpoint_due or is_stopped:
            logs.line(f"step {training.step} of {training.total_steps}: checkpoint, loss {metrics['loss']:.4f}")
            lead.checkpoint(metrics)
    logs.line(f"{'stopped' if is_stopped else 'done'} at step {training.step} of {training.total_steps}")
    return TrainOutcome(training.step, training.total_steps, not training.is_over, metrics)


def _fetch_log(context: TrainContext) -> RunLog:
    """The run's log, with this attempt as its newest."""
    log = RunLog(context.store, context.run_id, clock=context.clock)
    patiently(log.refresh)
    if log.attempt != context.attempt:
        raise FencedError(
            f"run {context.run_id}: attempt {context.attempt} is over, attempt {log.attempt} has taken over"
        )
    return log


def _explained(error: Exception) -> WeightAveragingError:
    """The error for people: was it a lost peer, or the recipe?"""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    is_peer_lost = isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("gloo", "nccl", "peer"))
    )
    if is_peer_lost:
        return TransientError(f"another worker was lost: {text}", code="peer_lost")
    return UserCodeError(f"the recipe raised {text}")
