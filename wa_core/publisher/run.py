"""A run whose training loop is the user's own: registered, trained, stopped, resumed, finished.

It joins a publisher, a pulse and the run log; it knows nothing of models. The invariant: the run's state in the
bucket follows the loop's fate. What ends well is `finalizing`, and `succeeded` once every average is published; an
exception fails it, with its reason; a loop that dies without a word leaves a run that can be resumed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Self

from pydantic import ValidationError

from wa_core.averaging.rules import parse_run_rule
from wa_core.catalog import own_runs
from wa_core.catalog.commit import patiently
from wa_core.catalog.runs import RunLog
from wa_core.clock import SystemClock
from wa_core.errors import ConflictError, InvalidInputError, WeightAveragingError
from wa_core.publisher.publisher import CheckpointPublisher
from wa_core.publisher.pulse import Pulse
from wa_core.publisher.restore import Restored, fetch_restored
from wa_core.records import (
    NO_RECIPE,
    AverageRequest,
    Cancelled,
    CheckpointPolicy,
    Paused,
    RunRequest,
    RunSpec,
    RunState,
    TrainingFinished,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from pydantic import JsonValue
    from torch import Tensor, nn

    from wa_core.store.base import ObjectStore

_ENDS_IN = frozenset({RunState.STARTING, RunState.RUNNING, RunState.PAUSING})


class OwnRun:
    """One attempt at a run of one's own; made by `register_run` and `resume_run`.

    Use it as a context manager: leaving it finishes the run, or fails it if an exception leaves with it. What was
    offered is committed in both cases.

    Attributes:
        run_id: the run.
        attempt: this attempt's number, from 1.
        restored: the checkpoint to go on from; None at the beginning.
    """

    def __init__(
        self, store: ObjectStore, spec: RunSpec, log: RunLog, *, total_steps: int | None, restored: Restored | None
    ) -> None:
        clock = SystemClock()
        self.run_id = spec.run_id
        self.attempt = log.attempt
        self.restored = restored
        self._max_failures = spec.request.max_failures
        self._log = log
        self._last = (restored.step, restored.metrics) if restored else (0, {})
        self._is_over = False
        self._publisher = CheckpointPublisher(store, spec.run_id, attempt=log.attempt, clock=clock)
        self._pulse = Pulse(store, spec.run_id, attempt=log.attempt, total_steps=total_steps, clock=clock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is None:
            self.finish()
        else:
            self.fail(exc)

    @property
    def is_stop_wanted(self) -> bool:
        """Whether the loop should end at its next step: its owner wants a pause or the end, or it is fenced."""
        return self._pulse.is_stop_wanted

    def report(self, step: int, *, epoch: int = 0, metrics: Mapping[str, float] | None = None) -> None:
        """Say where training stands, as often as you like: it costs nothing and is shown within seconds.

        Args:
            step: training steps done.
            epoch: the epoch that the step belongs to.
            metrics: numbers to show; those that are not finite are left out.
        """
        finite = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        self._last = (step, finite)
        self._pulse.at(step, epoch=epoch, metrics=finite)

    def offer(
        self,
        step: int,
        model: nn.Module | Mapping[str, Tensor],
        *,
        epoch: int = 0,
        lr: float | None = None,
        metrics: Mapping[str, float] | None = None,
        trainer_state: object = None,
    ) -> None:
        """As `CheckpointPublisher.offer`."""
        self._publisher.offer(step, model, epoch=epoch, lr=lr, metrics=metrics, trainer_state=trainer_state)
        self.report(step, epoch=epoch, metrics=metrics)

    def finish(self) -> None:
        """Commit everything offered and say that training is done; averages are finished by the averager.

        A run whose owner wanted a pause, or the end, is paused or cancelled instead.

        Raises:
            FencedError: a newer attempt has taken over.
            WeightAveragingError: something offered could not be committed; the run can be resumed.
        """
        if self._is_over:
            return
        self._close()
        patiently(self._log.refresh)
        match self._log.desired_state:
            case "cancelled":
                self._log.append(Cancelled(), attempt=self.attempt, expect=_ENDS_IN)
            case "paused":
                self._log.append(Paused(), attempt=self.attempt, expect={RunState.PAUSING})
            case _:
                step, metrics = self._last
                done = TrainingFinished(step=step, metrics=metrics)
                self._log.append(done, attempt=self.attempt, expect=_ENDS_IN)

    def fail(self, error: BaseException) -> None:
        """Commit everything offered and say what has gone wrong; what cannot be said is noted on `error`.

        An interrupt (Ctrl-C, `SystemExit`) does not count against the run's `max_failures`.
        """
        if self._is_over:
            return
        reason = own_runs.TRAINER_FAILED if isinstance(error, Exception) else own_runs.INTERRUPTED
        try:
            self._close()
            own_runs.fail(
                self._log,
                attempt=self.attempt,
                reason=reason,
                message=f"{type(error).__name__}: {error}",
                max_failures=self._max_failures,
            )
        except ConflictError:
            pass  # the attempt was over already, and is not ours to fail
        except WeightAveragingError as second:
            error.add_note(f"and the publisher: {second}")

    def _close(self) -> None:
        self._is_over = True
        try:
            self._publisher.close()
        finally:
            self._pulse.close()


def register_run(
    store: ObjectStore,
    *,
    averages: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    total_steps: int | None = None,
    recipe: str | None = None,
    config: Mapping[str, JsonValue] | None = None,
    checkpoint: CheckpointPolicy | None = None,
    max_failures: int = 0,
) -> OwnRun:
    """Make a run for a training loop of your own, and begin it; the service shows and averages it like any other.

    Args:
        store: the bucket.
        averages: name -> rule, such as ``{"swa": "swa:start_step=100"}``; more can be added at any time.
        labels: shown with the run, and searched by.
        total_steps: how many steps there will be, if that is known: what progress is measured by.
        recipe: a recipe that the averager knows, to recalibrate BatchNorm and to measure with; None: averages are
            published with the BatchNorm statistics pooled over the checkpoints, and not measured.
        config: the recipe's.
        checkpoint: which checkpoints are kept; `every_steps` is the loop's own affair.
        max_failures: after how many exceptions the run may still be resumed.

    Raises:
        InvalidInputError: a name or rule cannot be one.
        TransientError: the store is away.
    """
    try:
        request = RunRequest(
            recipe=recipe or NO_RECIPE,
            config=dict(config or {}),
            averages=[AverageRequest(name=name, rule=rule) for name, rule in (averages or {}).items()],
            labels=dict(labels or {}),
            checkpoint=checkpoint or CheckpointPolicy(),
            max_failures=max_failures,
        )
    except ValidationError as error:
        raise InvalidInputError(_first_of(error)) from None
    for average in request.averages:
        parse_run_rule(average.rule)
    clock = SystemClock()
    spec = own_runs.register(store, request, clock=clock)
    log = RunLog(store, spec.run_id, clock=clock)
    own_runs.begin(log)
    return OwnRun(store, spec, log, total_steps=total_steps, restored=None)


def resume_run(
    store: ObjectStore, run_id: str, *, from_step: int | None = None, total_steps: int | None = None
) -> OwnRun:
    """Begin another attempt at a run of your own, from its newest checkpoint, or the newest up to `from_step`.

    The attempt before it is over: what it may still offer is refused. `restored` of the run holds the checkpoint.

    Args:
        store: the bucket.
        run_id: the run, as `OwnRun.run_id` was.
        from_step: go back to the newest checkpoint of this step or before; None: the newest of all.
        total_steps: how many steps there will be, if that is known.

    Raises:
        RunNotFoundError: there is no such run.
        ConflictError: the service trains it (`not_own_run`), or its training is done.
        AlreadyFinishedError: it has ended.
        InvalidInputError: no checkpoint is as old as `from_step`.
        CorruptError: the checkpoint is damaged; try an older `from_step`.
    """
    clock = SystemClock()
    spec = own_runs.fetch_own_spec(store, run_id)
    log = RunLog(store, run_id, clock=clock)
    source = own_runs.begin(log, from_step=from_step)
    restored = fetch_restored(store, run_id, source) if source else None
    return OwnRun(store, spec, log, total_steps=total_steps, restored=restored)


def _first_of(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
