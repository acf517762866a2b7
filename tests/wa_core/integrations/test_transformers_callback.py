"""The callback for Hugging Face's Trainer, in the real one, on a model made here."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from support.own import assert_is_mean_of_checkpoints, average_to_end
from support.training import log_of, weights_of
from wa_core import register_run, resume_run
from wa_core.records import Failed, RunState
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from pathlib import Path

    from support.seaweed import Seaweed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    from wa_core.integrations.transformers import AveragingCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # that library's own
TOKENS = [torch.randint(64, (16,), generator=torch.Generator().manual_seed(n)) for n in range(64)]


class Texts(torch.utils.data.Dataset[Any]):
    """Random tokens; one of them raises if told to."""

    def __init__(self, *, raise_at: int | None = None) -> None:
        self._raise_at = raise_at
        self._num_read = 0

    def __len__(self) -> int:
        return len(TOKENS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._num_read += 1
        if self._num_read == self._raise_at:
            raise ZeroDivisionError("on purpose")
        return {"input_ids": TOKENS[index], "labels": TOKENS[index]}


def tiny() -> Any:
    """A GPT-2 of a few thousand parameters with tied embeddings."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2))


def trainer(
    model: Any, callback: AveragingCallback, folder: Path, *, max_steps: int = 8, texts: Any = None
) -> Any:
    """A Trainer that writes nothing of its own."""
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=max_steps,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=texts or Texts(), callbacks=[callback])


def test_transformers_ends_in_an_average(seaweed: Seaweed, tmp_path: Path) -> None:
    """Training offers every 2nd step to a run in S3, which succeeds with the mean to be downloaded; ties hold."""
    store = seaweed.new_store()
    opened = partial(register_run, store, averages={"swa": "swa"}, total_steps=8)
    model = tiny()

    with AveragingCallback(opened, every_steps=2) as averaging:
        trainer(model, averaging, tmp_path).train()

    assert averaging.run is not None
    run_id = averaging.run.run_id
    average_to_end(store, run_id)
    names = [name for name, _ in model.named_parameters()]
    served = assert_is_mean_of_checkpoints(store, run_id, "swa", steps=[2, 4, 6, 8], parameters=names)
    model.load_state_dict(served)
    assert model.lm_head.weight is model.transformer.wte.weight
    entry = log_of(store, run_id).lineage[1]
    kept = weights_of(store, entry)
    assert kept["lm_head.weight"].data_ptr() == kept["transformer.wte.weight"].data_ptr()  # uploaded once
    assert entry.metrics["loss"] > 0


def test_an_exception_fails_the_run_and_it_can_be_resumed(tmp_path: Path) -> None:
    """F19: what was offered before the exception is committed; another training goes on from there."""
    store = LocalStore(tmp_path / "bucket")
    averaging = AveragingCallback(partial(register_run, store, max_failures=1), every_steps=1)
    with pytest.raises(ZeroDivisionError), averaging:
        trainer(tiny(), averaging, tmp_path, texts=Texts(raise_at=14)).train()
    assert averaging.run is not None
    run_id = averaging.run.run_id
    assert log_of(store, run_id).state is RunState.RECOVERING
    done = [entry.step for entry in log_of(store, run_id).lineage]

    with AveragingCallback(partial(resume_run, store, run_id), every_steps=1) as again:
        trainer(tiny(), again, tmp_path, max_steps=2).train()

    steps = [entry.step for entry in log_of(store, run_id).lineage]
    assert done
    assert steps == list(range(1, len(done) + 3))
    assert log_of(store, run_id).state is RunState.FINALIZING


def test_an_exception_without_a_budget_fails_the_run(tmp_path: Path) -> None:
    """The run's reason is the exception."""
    store = LocalStore(tmp_path / "bucket")
    averaging = AveragingCallback(partial(register_run, store), every_steps=1)
    with pytest.raises(ZeroDivisionError), averaging:
        trainer(tiny(), averaging, tmp_path, texts=Texts(raise_at=10)).train()

    assert averaging.run is not None
    last = log_of(store, averaging.run.run_id).entries[-1]
    assert isinstance(last, Failed)
    assert last.message == "ZeroDivisionError: on purpose"
