"""The training loop: DDP over any torch process group, exact in its recovery.

It knows no Ray: it runs as well alone, or under plain multi-process gloo. It keeps one invariant: the weights
after step n depend on the run's spec, the number of workers and n alone, whether or not training was interrupted
on the way (bit-identical on CPU). Every rank calls `train`; rank 0 alone writes checkpoints and metrics.
"""

from __future__ import annotations

import traceback
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from services.recipes.loader import load_recipe
from services.runtime import tracing
from services.trainer.background import Background, Job
from services.trainer.changes import changes_of
from services.trainer.determinism import deterministic
from services.trainer.event_files import EventFiles
from services.trainer.heldout import Heldout
from services.trainer.logs import LogShipper
from services.trainer.metrics import MetricsWriter
from services.trainer.order import DataOrder, derived_seed, seed_step
from services.trainer.rates import Rates, is_checkpoint_due
from services.trainer.resume import restore, trainer_state
from services.trainer.update import Update
from services.trainer.watch import RunWatch
from wa_core.catalog.commit import patiently
from wa_core.catalog.packages import unpack_package
from wa_core.catalog.runs import RunLog, fetch_spec
from wa_core.clock import Clock, SystemClock
from wa_core.errors import FencedError, TransientError, UserCodeError, WeightAveragingError
from wa_core.publisher import UPLOAD_DEADLINE_S, CheckpointPublisher
from wa_core.records import AttemptStarted, CheckpointCommitted, RunRequest, RunSpec

if TYPE_CHECKING:
    from services.runtime.spans import Attributes
    from services.trainer.resume import Resumable
    from wa_core.recipe import Recipe
    from wa_core.store.base import ObjectStore

METRICS_INTERVAL_S = 2.0
HEARTBEAT_INTERVAL_S = 1.0
WATCH_INTERVAL_S = 1.0
LOGS_INTERVAL_S = 2.0
EVENTS_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class TrainContext:
    """Where a worker stands: whose run, which attempt, which rank of how many.

    What is done is traced below `traceparent`. With `world_size` above 1 the default process group must be
    initialised. `device` is a torch device such as ``cpu`` or ``cuda:0``; `node` names the machine in the log. The
    run's package is unpacked in `scratch_dir`, or the system's temporary folder.
    """

    store: ObjectStore
    run_id: str
    attempt: int
    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    node: str = ""
    clock: Clock = field(default_factory=SystemClock)
    upload_deadline_s: float = UPLOAD_DEADLINE_S
    scratch_dir: Path | None = None
    traceparent: str | None = None


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
            return _run(_Training(context, spec, recipe, log=_fetch_log(context)), logs=logs)
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


class _Training:
    """Model, optimizer and position of one rank."""

    def __init__(self, context: TrainContext, spec: RunSpec, recipe: Recipe, *, log: RunLog) -> None:
        request = spec.request
        resumed_from = _resumed_from(log)
        self.context = context
        self.options = request.training
        self.changes = changes_of(log.entries)
        self.every_steps = request.checkpoint.every_steps
        self.seed = request.seed
        self.recipe = recipe
        self.order = DataOrder(self.seed, self.recipe.num_train_samples, self.recipe.batch_size)
        self.total_steps = self.recipe.epochs * self.order.steps_per_epoch
        if context.device == "cpu":
            torch.set_num_threads(1)  # the sums of a step must not depend on how many cores a machine has
        torch.manual_seed(derived_seed(self.seed, "init"))
        self.model = self.recipe.build_model().to(context.device)
        self.optimizer = self.recipe.build_optimizer(self.model)
        scheduler = self.recipe.build_scheduler(self.optimizer, total_steps=self.total_steps)
        self.rates = Rates(self.options.lr_schedule, self.optimizer, scheduler)
        self.update = Update(self.options, self.recipe, self.optimizer, device=context.device)
        self.heldout = Heldout(self.options, self.recipe)
        self.resumable: dict[str, Resumable | None] = {
            "optimizer": self.optimizer,
            "scheduler": scheduler,
            "rates": self.rates,
            "scaler": self.update.scaler,
            "heldout": self.heldout,
        }
        self.step = 0
        if resumed_from is not None:
            self.step = restore(
                context.store, resumed_from, run_id=context.run_id, model=self.model, parts=self.resumable
            )
        self.is_over = self.heldout.is_over or self.step >= self.total_steps
        self.replica: nn.Module = self.model
        if context.world_size > 1:
            self.replica = nn.parallel.DistributedDataParallel(self.model)

    @property
    def epoch(self) -> int:
        """The epoch (from 0) that the last step done belongs to."""
        return max(0, self.step - 1) // self.order.steps_per_epoch

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether the step just done is one whose weights are kept."""
        schedule = self.options.lr_schedule
        return self.is_over or is_checkpoint_due(schedule, self.step, every_steps=self.every_steps)

    def advance(self) -> dict[str, float]:
        """Do one step, and return this rank's part of the mean loss, with the learning rate used."""
        context = self.context
        batch_number = self.changes.batch(self.step)
        indices, weight = self.order.share(batch_number, rank=context.rank, world_size=context.world_size)
        generator = seed_step(self.seed, step=self.step, rank=context.rank)

        def batch_of(part: Tensor) -> Any:  # noqa: ANN401  whatever the recipe makes it
            return _to_device(self.recipe.train_batch(part, generator=generator), context.device)

        self.replica.train()
        self.rates.begin_step(self.step)
        loss = self.update.add_gradients(self.replica, indices, weight=weight, batch_of=batch_of)
        found = self._step_optimizer()
        self.rates.end_step(self.step)
        self.step += 1
        return {"loss": loss / context.world_size, **found}

    def measure(self) -> dict[str, float]:
        """Held-out metrics of the weights as they are, if it is time for them; rank 0 alone measures."""
        return self.heldout.measure(self.model) if self.heldout.is_due(self.step) else {}

    def _step_optimizer(self) -> dict[str, float]:
        """Step with learning rates as owners scaled them, which schedulers never see; returns the rate too."""
        groups, scale = self.optimizer.param_groups, self.changes.lr_scale(self.step)
        unscaled = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * scale
        found = {"lr": float(groups[0]["lr"]), **self.update.apply()}
        for group, its_lr in zip(groups, unscaled, strict=True):
            group["lr"] = its_lr
        return found

    def agree(self, loss: float, *, is_stop_wanted: bool) -> tuple[float, bool]:
        """The mean loss of the global batch, and whether any rank wants to stop: the same on all ranks.

        So is, afterwards, whether training is over.
        """
        is_over = self.heldout.is_over or self.step == self.total_steps
        if self.context.world_size > 1:
            shared = torch.tensor([loss, float(is_stop_wanted), float(is_over)], device=self.context.device)
            distributed.all_reduce(shared)
            loss, is_stop_wanted, is_over = float(shared[0]), bool(shared[1] > 0), bool(shared[2] > 0)
        self.is_over = is_over
        return loss, is_stop_wanted


def _run(training: _Training, *, logs: LogShipper) -> TrainOutcome:
    context = training.context
    logs.line(
        f"attempt {context.attempt}, rank {context.rank} of {context.world_size}: starting at step "
        f"{training.step} of {training.total_steps} on {context.device}"
        + (f" of node {context.node}" if context.node else "")
    )
    if context.rank != 0:
        return _steps(training, lead=None, logs=logs)
    with ExitStack() as stack:
        return _steps(training, lead=_Lead(training, stack), logs=logs)


class _Lead:
    """What rank 0 does besides training: checkpoints, metrics, heartbeat, watching for a cancel."""

    def __init__(self, training: _Training, stack: ExitStack) -> None:
        context = training.context
        self._training = training
        self.watch = RunWatch(context.store, context.run_id, attempt=context.attempt, clock=context.clock)
        self.metrics = MetricsWriter(
            context.store,
            context.run_id,
            attempt=context.attempt,
            total_steps=training.total_steps,
            clock=context.clock,
        )
        self.metrics.at(training.step, epoch=training.epoch)
        jobs = [
            Job(self.watch.look, WATCH_INTERVAL_S, is_last_wanted=False),
            Job(self.metrics.beat, HEARTBEAT_INTERVAL_S),
            Job(self.metrics.flush, METRICS_INTERVAL_S),
        ]
        self.events: EventFiles | None = None
        if training.options.tensorboard:
            self.events = EventFiles(context.store, context.run_id, attempt=context.attempt, clock=context.clock)
            jobs.append(Job(self.events.flush, EVENTS_INTERVAL_S))
        stack.enter_context(Background(jobs))
        self._publisher = stack.enter_context(
            CheckpointPublisher(
                context.store,
                context.run_id,
                attempt=context.attempt,
                clock=context.clock,
                upload_deadline_s=context.upload_deadline_s,
                around_upload=lambda step: tracing.span(
                    "checkpoint", parent=context.traceparent, attributes={"wa.step": step}
                ),
            )
        )

    def note(self, metrics: dict[str, float]) -> None:
        """Record the metrics of the step just done."""
        training = self._training
        self.metrics.add(training.step, epoch=training.epoch, metrics=metrics)
        if self.events is not None:
            self.events.add(training.step, metrics=metrics)

    def checkpoint(self, metrics: dict[str, float]) -> None:
        """Offer the weights as they are now."""
        training = self._training
        self._publisher.offer(
            training.step,
            training.model,
            epoch=training.epoch,
            lr=metrics.get("lr"),
            metrics={name: value for name, value in metrics.items() if name != "lr"},
            trainer_state=trainer_state(training.resumable, step=training.step),
            is_last=training.is_over,
        )


def _steps(training: _Training, *, lead: _Lead | None, logs: LogShipper) -> TrainOutcome:
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


def _resumed_from(log: RunLog) -> CheckpointCommitted | None:
    """The checkpoint that the log says its newest attempt grows from."""
    seqs = [entry.resumed_from for entry in log.entries if isinstance(entry, AttemptStarted)]
    found = [entry for entry in log.entries if isinstance(entry, CheckpointCommitted) and entry.seq == seqs[-1]]
    return found[0] if found else None


def _explained(error: Exception) -> WeightAveragingError:
    """The error for people: was it a lost peer, or the recipe?"""
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    is_peer_lost = isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("gloo", "nccl", "peer"))
    )
    if is_peer_lost:
        return TransientError(f"another worker was lost: {text}", code="peer_lost")
    return UserCodeError(f"the recipe raised {text}")


def _to_device(batch: Any, device: str) -> Any:  # noqa: ANN401  a batch is whatever the recipe made it
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: _to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [_to_device(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
