"""The Lightning callback, in real Lightning."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from support.own import assert_is_mean_of_checkpoints, average_to_end, batches, small_model
from support.training import log_of
from wa_core import register_run, resume_run
from wa_core.records import CancelRequested, Failed, RunState
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from pathlib import Path

    from support.seaweed import Seaweed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning.pytorch as pl

    from wa_core.integrations.lightning import AveragingCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning has opinions on workers and loggers
PARAMETERS = [f"model.{name}" for name, _ in small_model().named_parameters()]


class Module(pl.LightningModule):
    """A small classifier; raises at a step if told to."""

    def __init__(self, *, raise_at: int | None = None) -> None:
        super().__init__()
        self.model = small_model()
        self.raise_at = raise_at

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """The loss."""
        if batch_idx == self.raise_at:
            raise ZeroDivisionError("on purpose")
        inputs, labels = batch
        loss = functional.cross_entropy(self.model(inputs), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """SGD with momentum, and a schedule."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def fit(
    module: Module, callback: AveragingCallback, folder: Path, *, num_batches: int = 12, **options: Any
) -> None:
    """One epoch."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, DataLoader(batches(num_batches), batch_size=None))


def run_id_of(callback: AveragingCallback) -> str:
    """The run that it opened."""
    assert callback.run is not None
    return callback.run.run_id


def test_lightning_ends_in_an_average(seaweed: Seaweed, tmp_path: Path) -> None:
    """Fitting offers every 4th step to a run in S3, which succeeds with the mean of them to be downloaded."""
    store = seaweed.new_store()
    callback = AveragingCallback(
        partial(register_run, store, averages={"swa": "swa"}, total_steps=12), every_steps=4
    )

    fit(Module(), callback, tmp_path)

    run_id = run_id_of(callback)
    average_to_end(store, run_id)
    served = assert_is_mean_of_checkpoints(store, run_id, "swa", steps=[4, 8, 12], parameters=PARAMETERS)
    Module().load_state_dict(served)
    entry = log_of(store, run_id).lineage[0]
    assert entry.metrics["loss"] > 0
    assert entry.lr == 0.1


def test_accumulated_batches_are_no_steps(tmp_path: Path) -> None:
    """With gradients accumulated over 3 batches, 13 batches are 5 steps; the last weights are kept as well."""
    store = LocalStore(tmp_path / "bucket")
    callback = AveragingCallback(partial(register_run, store), every_steps=2)

    fit(Module(), callback, tmp_path, num_batches=13, accumulate_grad_batches=3)

    assert [entry.step for entry in log_of(store, run_id_of(callback)).lineage] == [2, 4, 5]


def test_an_exception_fails_the_run_and_it_can_be_resumed(tmp_path: Path) -> None:
    """F19: what was offered before the exception is committed; another fit goes on from there."""
    store = LocalStore(tmp_path / "bucket")
    callback = AveragingCallback(partial(register_run, store, max_failures=1), every_steps=2)
    with pytest.raises(ZeroDivisionError):
        fit(Module(raise_at=5), callback, tmp_path)
    run_id = run_id_of(callback)
    assert log_of(store, run_id).state is RunState.RECOVERING

    resumed, module = AveragingCallback(partial(resume_run, store, run_id), every_steps=2), Module()
    fit(module, resumed, tmp_path, num_batches=4)

    assert [entry.step for entry in log_of(store, run_id).lineage] == [2, 4, 6, 8]
    assert resumed.run is not None
    assert resumed.run.restored is not None
    assert resumed.run.restored.trainer_state["optimizers"][0]["state"]
    assert log_of(store, run_id).state is RunState.FINALIZING


def test_an_exception_without_a_budget_fails_the_run(tmp_path: Path) -> None:
    """The run's reason is the exception."""
    store = LocalStore(tmp_path / "bucket")
    callback = AveragingCallback(partial(register_run, store), every_steps=2)
    with pytest.raises(ZeroDivisionError):
        fit(Module(raise_at=3), callback, tmp_path)

    last = log_of(store, run_id_of(callback)).entries[-1]
    assert isinstance(last, Failed)
    assert last.message == "ZeroDivisionError: on purpose"


def test_a_cancel_stops_fitting(tmp_path: Path) -> None:
    """Fitting ends at a step once the owner has cancelled, and the run is cancelled with its last weights."""
    store = LocalStore(tmp_path / "bucket")
    callback = AveragingCallback(partial(register_run, store), every_steps=1000)

    class Cancelling(pl.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            assert callback.run is not None
            if log_of(store, run_id_of(callback)).desired_state == "succeeded":
                log_of(store, run_id_of(callback)).append(CancelRequested())
            callback.run._pulse._look()

    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[Cancelling(), callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(batches(12), batch_size=None))

    log = log_of(store, run_id_of(callback))
    assert (log.state, [entry.step for entry in log.lineage]) == (RunState.CANCELLED, [1])


def test_an_interval_below_one_is_refused() -> None:
    """A checkpoint needs a step."""
    with pytest.raises(ValueError, match="every_steps is 0"):
        AveragingCallback(register_run, every_steps=0)
