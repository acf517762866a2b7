"""What training can be told whatever the recipe is: parts of a batch, clipping, evaluation, early stop, files."""

from __future__ import annotations

import io
import json
import struct
from typing import TYPE_CHECKING

import pytest
import torch
from tensorboardX.proto import event_pb2

from services.recipes.loader import load_recipe
from services.trainer.context import TrainContext
from services.trainer.loop import TrainOutcome, train
from services.trainer.order import DataOrder
from services.trainer.update import Update
from support.averaging import averager, run_until_idle, served_weights
from support.training import digits_request, log_of, start_attempt, submit_run
from wa_core import layout
from wa_core.errors import InvalidInputError
from wa_core.records import (
    AverageRequest,
    CheckpointPolicy,
    EarlyStop,
    RunRequest,
    TrainingFinished,
    TrainingOptions,
)
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator

CHAR_LM = "services.recipes.char_lm:CharLm"
TINY_LM = {"epochs": 1, "batch_size": 64, "width": 16, "layers": 1}  # 8 steps


def gradients(options: TrainingOptions) -> list[torch.Tensor]:
    """Those of one step of a char_lm without dropout, which is float32 and has no BatchNorm."""
    recipe = load_recipe(CHAR_LM, {**TINY_LM, "dropout": 0.0}, seed=0)
    torch.manual_seed(0)
    model = recipe.build_model()
    update = Update(options, recipe, recipe.build_optimizer(model), device="cpu")
    generator = torch.Generator()
    update.add_gradients(
        model, torch.arange(13), weight=1.0, batch_of=lambda part: recipe.train_batch(part, generator=generator)
    )
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("num_parts", [2, 5, 13])
def test_parts_of_a_batch_have_its_gradient(num_parts: int) -> None:
    """Accumulation changes the memory that a step takes, not its gradient, also when parts are uneven."""
    for whole, summed in zip(
        gradients(TrainingOptions()), gradients(TrainingOptions(accumulate_batches=num_parts)), strict=True
    ):
        torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-6)


def test_more_parts_than_samples_are_refused() -> None:
    """A batch that cannot be cut so often is refused with what to change."""
    with pytest.raises(InvalidInputError, match="smaller accumulate_batches"):
        gradients(TrainingOptions(accumulate_batches=14))


@pytest.mark.parametrize("precision", ["bf16", "float16"])
def test_lower_precision_leaves_float32_weights(precision: str) -> None:
    """Autocast computes in fewer bits, near the float32 result, and what is kept is float32."""
    store, outcomes = MemoryStore(), []
    for wanted in ("float32", precision):
        options = TrainingOptions.model_validate({"precision": wanted})
        run_id, outcome = trained(store, digits_request(training=options))
        outcomes.append(outcome)

    entry = log_of(store, run_id).lineage[-1]
    assert b"F32" in store.get(entry.files["model.safetensors"].key)[:4000]
    assert outcomes[0].metrics["loss"] == pytest.approx(outcomes[1].metrics["loss"], rel=0.2)
    assert outcomes[0].metrics["loss"] != outcomes[1].metrics["loss"]


def test_heldout_metrics_are_measured_on_the_way() -> None:
    """Every `evaluate_every_steps` steps the line has held-out metrics, and so has a checkpoint taken there."""
    options = TrainingOptions(evaluate_every_steps=4, clip_norm=0.1)
    store = MemoryStore()
    run_id, _ = trained(store, digits_request(training=options))

    lines = metric_lines(store, run_id)
    assert [line["step"] for line in lines if "heldout_loss" in line] == [4, 8]
    assert all(line["grad_norm"] > 0 for line in lines)
    checkpoints = log_of(store, run_id).lineage
    assert [entry.step for entry in checkpoints if "heldout_accuracy" in entry.metrics] == [4, 8]


def test_training_ends_early_when_it_gets_no_better() -> None:
    """Early stop takes a last checkpoint marked as such; an attempt that resumes there trains no step."""
    options = TrainingOptions(evaluate_every_steps=2, early_stop=EarlyStop(patience=2, min_delta=1e6))
    store = MemoryStore()
    run_id, outcome = trained(store, digits_request(training=options))

    last = log_of(store, run_id).lineage[-1]
    assert (outcome.step, outcome.is_stopped, last.step, last.is_last) == (6, False, 6, True)
    again = train(TrainContext(store, run_id, start_attempt(store, run_id, resumed_from=last.seq)))
    assert (again.step, again.is_stopped) == (6, False)


def test_metrics_are_written_for_tensorboard() -> None:
    """The event files of an attempt, one after the other, hold every step's metrics."""
    store = MemoryStore()
    run_id, _ = trained(store, digits_request(training=TrainingOptions(tensorboard=True)))

    keys = [info.key for info in store.list(f"{layout.run_prefix(run_id)}tensorboard/0001/events.out.tfevents.")]
    events = [event for key in keys for event in read_events(store.get(key))]
    losses = {
        event.step: value.simple_value for event in events for value in event.summary.value if value.tag == "loss"
    }
    assert losses == pytest.approx({line["step"]: line["loss"] for line in metric_lines(store, run_id)})
    assert len(losses) == 11


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_batch_of_a_step_is_the_same_for_any_number_of_workers(world_size: int) -> None:
    """The data order contract: workers share out a step's batch, whole and once, with weights of mean 1."""
    order = DataOrder(seed=3, num_samples=100, batch_size=32)
    for step in range(7):
        shares = [order.share(step, rank=rank, world_size=world_size) for rank in range(world_size)]

        assert torch.equal(torch.cat([indices for indices, _ in shares]), order.batch(step))
        assert sum(weight for _, weight in shares) == pytest.approx(world_size)


def test_tied_weights_are_folded_once_and_load_strictly() -> None:
    """char_lm's head and embedding stay one tensor in the average, and the download loads into a new model."""
    store = MemoryStore()
    run_id, outcome = trained(
        store,
        RunRequest(
            recipe=CHAR_LM,
            config=TINY_LM,
            checkpoint=CheckpointPolicy(every_steps=4),
            averages=[AverageRequest(name="swa", rule="swa")],
        ),
    )
    log_of(store, run_id).append(TrainingFinished(step=outcome.step), attempt=1)
    run_until_idle(averager(store))

    weights = served_weights(store, run_id, "swa")
    model = load_recipe(CHAR_LM, TINY_LM, seed=0).build_model()
    model.load_state_dict(weights, strict=True)
    assert torch.equal(weights["head.weight"], weights["characters.weight"])
    states = [
        torch.from_numpy(_tied(store, entry.files["model.safetensors"].key))
        for entry in log_of(store, run_id).lineage
    ]
    torch.testing.assert_close(
        weights["head.weight"], torch.stack(states).double().mean(0).float(), rtol=0, atol=0
    )


def _tied(store: MemoryStore, key: str) -> object:
    from safetensors.numpy import load

    tensors = load(store.get(key))
    assert ("head.weight" in tensors) != ("characters.weight" in tensors)  # written once
    return tensors["characters.weight"]


def trained(store: MemoryStore, request: RunRequest) -> tuple[str, TrainOutcome]:
    """Submit and train, on one worker."""
    run_id = submit_run(store, request)
    return run_id, train(TrainContext(store, run_id, start_attempt(store, run_id)))


def metric_lines(store: MemoryStore, run_id: str) -> list[dict[str, float]]:
    """All metric lines of a run."""
    parts = [store.get(info.key).decode() for info in store.list(layout.metrics_prefix(run_id))]
    return [json.loads(line) for part in parts for line in part.splitlines()]


def read_events(body: bytes) -> Iterator[event_pb2.Event]:
    """The records of an event file: length, its checksum, the event, its checksum."""
    stream = io.BytesIO(body)
    while header := stream.read(12):
        yield event_pb2.Event.FromString(stream.read(struct.unpack("<Q", header[:8])[0]))
        stream.read(4)
