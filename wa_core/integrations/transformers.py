"""A callback for the `Trainer` of Hugging Face Transformers that offers checkpoints to a run of one's own.

It knows that library's hooks; what becomes of the checkpoints is the run's affair. The invariant: the run ends as
``trainer.train()`` does, where the callback is used as a context manager; what was offered is committed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from wa_core.integrations.attempt import Attempt
from wa_core.integrations.sharded import full_state_dict

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "wa_core.integrations.transformers needs Transformers 5; pip install 'weight-averaging[transformers]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from wa_core.publisher import OwnRun


class AveragingCallback(TrainerCallback):  # type: ignore[misc]  # Transformers is not looked into
    """Offers the model's weights every so many optimizer steps, and the last ones.

    Args:
        open_run: makes the run, such as ``lambda: register_run(store, averages={"swa": "swa"})``, or resumes one;
            called when training starts, on the main process alone.
        every_steps: how many optimizer steps lie between checkpoints.

    Use it as a context manager around ``trainer.train()``: the library tells callbacks of no exception, and the
    run would seem to go on until the process ends. A run that is resumed, by one process, brings back weights,
    optimizer and scheduler; steps go on counting from there, and the data begin anew. When the run's owner wants
    it to stop, training ends after the step.
    """

    def __init__(self, open_run: Callable[[], OwnRun], *, every_steps: int) -> None:
        self._attempt = Attempt(open_run, every_steps=every_steps)
        self._metrics: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is not None:
            self._attempt.fail(exc)

    @property
    def run(self) -> OwnRun | None:
        """The run, once training has started; None on other processes than the main one."""
        return self._attempt.run

    def on_train_begin(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        **parts: Any,  # noqa: ANN401  as the library calls it
    ) -> None:
        """Open the run, and load what it resumes from."""
        restored = self._attempt.begin(is_main=state.is_world_process_zero)
        if restored is None:
            return
        parts["model"].load_state_dict(restored.weights)
        for name in ("optimizer", "lr_scheduler"):
            if its_state := (restored.trainer_state or {}).get(name):
                parts[name].load_state_dict(its_state)

    def on_log(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: object,
    ) -> None:
        """Keep the newest numbers, for the checkpoints and for whoever watches."""
        self._metrics |= {
            name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)
        }
        self._attempt.report(state.global_step, metrics=self._metrics)

    def on_step_end(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **parts: Any,  # noqa: ANN401  as the library calls it
    ) -> None:
        """Offer what is due."""
        if self._attempt.is_due(state.global_step):
            self._offer(state, parts)
        if self._attempt.is_stop_wanted:
            control.should_training_stop = True

    def on_train_end(
        self,
        _args: TrainingArguments,
        state: TrainerState,
        _control: TrainerControl,
        **parts: Any,  # noqa: ANN401  as the library calls it
    ) -> None:
        """Offer the last weights, and finish the run."""
        if self._attempt.is_due(state.global_step, is_last=True):
            self._offer(state, parts)
        self._attempt.finish()

    def _offer(self, state: TrainerState, parts: Mapping[str, Any]) -> None:
        model: nn.Module = parts["model"]
        optimizer, scheduler = parts["optimizer"], parts["lr_scheduler"]
        self._attempt.offer(
            state.global_step,
            full_state_dict(model),
            epoch=int(state.epoch or 0),
            lr=float(optimizer.param_groups[0]["lr"]),
            metrics=self._metrics,
            trainer_state={"optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()},
        )
