"""What rank 0 does besides training: checkpoints, metrics, heartbeat, watching for a cancel.

It knows the bucket; not how a step is done. The invariant: once its stack has ended, every checkpoint that it was
offered is committed, and every metric written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.runtime import tracing
from services.trainer.background import Background, Job
from services.trainer.event_files import EventFiles
from services.trainer.metrics import MetricsWriter
from services.trainer.resume import trainer_state
from services.trainer.watch import RunWatch
from wa_core.publisher import CheckpointPublisher

if TYPE_CHECKING:
    from contextlib import ExitStack

    from services.trainer.context import TrainContext
    from services.trainer.training import Training

METRICS_INTERVAL_S = 2.0
HEARTBEAT_INTERVAL_S = 1.0
WATCH_INTERVAL_S = 1.0
EVENTS_INTERVAL_S = 10.0


class Lead:
    """What rank 0 does besides training: checkpoints, metrics, heartbeat, watching for a cancel."""

    def __init__(self, training: Training, stack: ExitStack) -> None:
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
        self._publisher = stack.enter_context(_publisher(context))

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


def _publisher(context: TrainContext) -> CheckpointPublisher:
    return CheckpointPublisher(
        context.store,
        context.run_id,
        attempt=context.attempt,
        clock=context.clock,
        upload_deadline_s=context.upload_deadline_s,
        around_upload=lambda step: tracing.span(
            "checkpoint", parent=context.traceparent, attributes={"wa.step": step}
        ),
    )
