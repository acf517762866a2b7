"""Model, optimizer and position of one rank, from one step to the next.

It knows the run's spec, its recipe and the other ranks; nothing of what is written down of it. The invariant: what
it is after a step depends on the spec, the number of workers and the step alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn

from services.trainer.changes import changes_of
from services.trainer.heldout import Heldout
from services.trainer.order import DataOrder, derived_seed, seed_step
from services.trainer.rates import Rates, is_checkpoint_due
from services.trainer.resume import restore
from services.trainer.update import Update
from wa_core.records import AttemptStarted, CheckpointCommitted

if TYPE_CHECKING:
    from services.trainer.context import TrainContext
    from services.trainer.resume import Resumable
    from wa_core.catalog.runs import RunLog
    from wa_core.recipe import Recipe
    from wa_core.records import RunSpec


class Training:
    """Model, optimizer and position of one rank."""

    def __init__(self, context: TrainContext, spec: RunSpec, recipe: Recipe, *, log: RunLog) -> None:
        request = spec.request
        self.context = context
        self.options = request.training
        self.changes = changes_of(log.entries)
        self.every_steps = request.checkpoint.every_steps
        self.seed = request.seed
        self.recipe = recipe
        self.order = DataOrder(self.seed, recipe.num_train_samples, recipe.batch_size)
        self.total_steps = recipe.epochs * self.order.steps_per_epoch
        if context.device == "cpu":
            torch.set_num_threads(1)  # the sums of a step must not depend on how many cores a machine has
        torch.manual_seed(derived_seed(self.seed, "init"))
        self.model = recipe.build_model().to(context.device)
        self.optimizer = recipe.build_optimizer(self.model)
        scheduler = recipe.build_scheduler(self.optimizer, total_steps=self.total_steps)
        self.rates = Rates(self.options.lr_schedule, self.optimizer, scheduler)
        self.update = Update(self.options, recipe, self.optimizer, device=context.device)
        self.heldout = Heldout(self.options, recipe)
        self.resumable = self._resumable(scheduler)
        self.step = self._resume(log)
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

    def _resumable(self, scheduler: Resumable | None) -> dict[str, Resumable | None]:
        """Everything but the model that a checkpoint holds, so that an attempt goes on from it exactly."""
        return {
            "optimizer": self.optimizer,
            "scheduler": scheduler,
            "rates": self.rates,
            "scaler": self.update.scaler,
            "heldout": self.heldout,
        }

    def _resume(self, log: RunLog) -> int:
        """Take over what the attempt grows from, if anything; the step that it was at."""
        resumed_from = _resumed_from(log)
        if resumed_from is None:
            return 0
        context = self.context
        return restore(context.store, resumed_from, run_id=context.run_id, model=self.model, parts=self.resumable)


def _resumed_from(log: RunLog) -> CheckpointCommitted | None:
    """The checkpoint that the log says its newest attempt grows from."""
    seqs = [entry.resumed_from for entry in log.entries if isinstance(entry, AttemptStarted)]
    found = [entry for entry in log.entries if isinstance(entry, CheckpointCommitted) and entry.seq == seqs[-1]]
    return found[0] if found else None


def _to_device(batch: Any, device: str) -> Any:  # noqa: ANN401  a batch is whatever the recipe made it
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: _to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [_to_device(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
