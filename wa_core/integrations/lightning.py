"""A Lightning callback that offers checkpoints to a run of one's own.

It knows Lightning's hooks; what becomes of the checkpoints is the run's affair. The invariant: the run ends as
``trainer.fit`` does, finished or failed; what was offered is committed in both cases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wa_core.integrations.attempt import Attempt

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise ImportError(
        "wa_core.integrations.lightning needs Lightning 2; pip install 'weight-averaging[lightning]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import LightningModule, Trainer

    from wa_core.publisher import OwnRun


class AveragingCallback(Callback):  # type: ignore[misc]  # Lightning is not looked into
    """Offers the module's weights every so many optimizer steps, and the last ones.

    Args:
        open_run: makes the run, such as ``lambda: register_run(store, averages={"swa": "swa"})``, or resumes one;
            called when fitting starts, on the main process alone.
        every_steps: how many optimizer steps lie between checkpoints.

    A run that is resumed brings back weights, optimizers and schedulers; steps go on counting from there. The data
    loader and the epoch begin anew. When the run's owner wants it to stop, fitting ends after the step.
    """

    def __init__(self, open_run: Callable[[], OwnRun], *, every_steps: int) -> None:
        super().__init__()
        self._attempt = Attempt(open_run, every_steps=every_steps)

    @property
    def run(self) -> OwnRun | None:
        """The run, once fitting has started; None on other processes than the main one."""
        return self._attempt.run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the run, and load what it resumes from."""
        restored = self._attempt.begin(is_main=trainer.is_global_zero)
        # The other processes have no run to ask; they get what the main one has.
        restored = trainer.strategy.broadcast(restored, src=0)
        if restored is None:
            return
        pl_module.load_state_dict(restored.weights)
        state = restored.trainer_state or {}
        for optimizer, its_state in zip(trainer.optimizers, state.get("optimizers", ()), strict=False):
            optimizer.load_state_dict(its_state)
        for config, its_state in zip(trainer.lr_scheduler_configs, state.get("schedulers", ()), strict=False):
            config.scheduler.load_state_dict(its_state)

    def on_train_batch_end(self, trainer: Trainer, _module: LightningModule, *_: object) -> None:
        """Offer what is due; batches that only accumulate gradients are no steps."""
        if self._attempt.is_due(trainer.global_step):
            self._offer(trainer)
        else:
            self._attempt.report(trainer.global_step, metrics=_numbers(trainer.callback_metrics))
        if trainer.strategy.reduce_boolean_decision(self._attempt.is_stop_wanted, all=False):
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, _module: LightningModule) -> None:
        """Offer the last weights, and finish the run."""
        if self._attempt.is_due(trainer.global_step, is_last=True):
            self._offer(trainer)
        self._attempt.finish()

    def on_exception(self, _trainer: Trainer, _module: LightningModule, exception: BaseException) -> None:
        """Commit what was offered, and fail the run."""
        self._attempt.fail(exception)

    def _offer(self, trainer: Trainer) -> None:
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._attempt.offer(
            trainer.global_step,
            trainer.strategy.lightning_module_state_dict(),  # on every rank: gathers what is sharded
            epoch=trainer.current_epoch,
            lr=float(trainer.optimizers[0].param_groups[0]["lr"]) if trainer.optimizers else None,
            metrics=_numbers(trainer.callback_metrics),
            trainer_state={
                "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
                "schedulers": [scheduler.state_dict() for scheduler in schedulers],
            },
        )


def _numbers(metrics: Any) -> dict[str, float]:  # noqa: ANN401  tensors by name
    return {name: float(value) for name, value in metrics.items() if value.numel() == 1}
