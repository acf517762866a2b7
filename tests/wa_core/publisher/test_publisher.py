"""The checkpoint publisher: what is offered is committed, in order, within bounds, or an error says so."""

from __future__ import annotations

import io
import math
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from support.patience import eventually
from support.training import digits_request, log_of, start_attempt, submit_run, weights_of
from wa_core.errors import ConflictError, FencedError, InvalidInputError, StoreUnavailableError
from wa_core.publisher import CheckpointPublisher
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from wa_core.store.base import Body


class GatedStore(MemoryStore):
    """A store whose uploads wait at a gate, and fail while it is away; it counts what is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.num_failing_puts = 0
        self.num_failing_commits = 0

    def put(self, key: str, body: Body) -> None:
        """Write, once the gate is open."""
        if "checkpoints/" in key:
            assert self.gate.wait(30)
            if self.num_failing_puts:
                self.num_failing_puts -= 1
                raise StoreUnavailableError("the store is away")
        super().put(key, body)

    def create(self, key: str, body: bytes) -> None:
        """Create, but lose the response of some that succeeded."""
        super().create(key, body)
        if self.num_failing_commits and "/log/" in key:
            self.num_failing_commits -= 1
            raise StoreUnavailableError("the response was lost")


@pytest.fixture
def store() -> GatedStore:
    """A store with an open gate."""
    return GatedStore()


@pytest.fixture
def run_id(store: GatedStore) -> str:
    """A run in its first attempt."""
    run_id = submit_run(store, digits_request())
    start_attempt(store, run_id)
    return run_id


def model_of(value: float) -> nn.Linear:
    """A model with one value everywhere."""
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def test_an_offer_is_committed_with_verified_files(store: GatedStore, run_id: str) -> None:
    """The entry has the step, epoch, rate and finite metrics, and the files hold what was offered."""
    optimizer = torch.optim.SGD(model_of(0).parameters(), lr=0.1, momentum=0.9)

    with CheckpointPublisher(store, run_id, attempt=1) as publisher:
        publisher.offer(
            7,
            model_of(1.5),
            epoch=2,
            lr=0.05,
            metrics={"loss": 0.25, "bad": float("nan")},
            trainer_state={"optimizer": optimizer.state_dict()},
        )

    (entry,) = log_of(store, run_id).lineage
    assert (entry.step, entry.epoch, entry.lr, entry.metrics) == (7, 2, 0.05, {"loss": 0.25})
    weights = weights_of(store, entry)
    assert set(weights) == {"weight", "bias"}
    assert (weights["weight"] == 1.5).all()
    state = torch.load(io.BytesIO(store.get(entry.files["trainer.pt"].key)), weights_only=True)
    assert state["optimizer"]["param_groups"][0]["momentum"] == 0.9


@pytest.mark.parametrize("run_id", ["../x", "", "my-run"])
def test_what_is_no_run_id_is_refused_at_once(store: GatedStore, run_id: str) -> None:
    """The refusal comes before anything is offered, and nothing is written."""
    with pytest.raises(InvalidInputError, match="is not a run id; run ids are 26 characters"):
        CheckpointPublisher(store, run_id)
    assert list(store.list("")) == []


def test_an_offer_is_a_snapshot(store: GatedStore, run_id: str) -> None:
    """Training on after an offer does not change what is uploaded."""
    store.gate.clear()
    model = model_of(1.0)
    momentum = torch.ones(3)
    with CheckpointPublisher(store, run_id, attempt=1) as publisher:
        publisher.offer(1, model, trainer_state={"momentum": [momentum]})
        with torch.no_grad():
            model.weight.fill_(2.0)
            momentum.fill_(2.0)
        store.gate.set()

    (entry,) = log_of(store, run_id).lineage
    state = torch.load(io.BytesIO(store.get(entry.files["trainer.pt"].key)), weights_only=True)
    assert (weights_of(store, entry)["weight"] == 1.0).all()
    assert (state["momentum"][0] == 1.0).all()


def test_large_weights_are_copied_whole(store: GatedStore, run_id: str) -> None:
    """Weights that two threads copy together arrive as they were, each time, where training has one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    weights = {f"layer{number}": torch.full((1 << 18,), float(number)) for number in range(12)}
    try:
        with CheckpointPublisher(store, run_id, attempt=1) as publisher:
            for step in (1, 2):
                publisher.offer(step, weights)
                for tensor in weights.values():
                    tensor.add_(100.0)
    finally:
        torch.set_num_threads(threads)

    for shift, entry in enumerate(log_of(store, run_id).lineage):
        found = weights_of(store, entry)
        assert all((found[f"layer{number}"] == number + 100 * shift).all() for number in range(12))


def test_names_are_canonical_and_ties_are_kept(store: GatedStore, run_id: str) -> None:
    """Prefixes of wrappers are gone, and tensors that share memory do so in the file as well."""
    weight = torch.ones(4, 4)

    with CheckpointPublisher(store, run_id) as publisher:
        publisher.offer(1, {"module.a": weight, "module.b": weight})

    (entry,) = log_of(store, run_id).lineage
    assert set(weights_of(store, entry)) == {"a", "b"}
    assert entry.files["model.safetensors"].size_bytes < 2 * weight.nbytes + 64


@pytest.mark.parametrize("state", [np.arange(3), [np.random.default_rng(0)], {"seen": Path("data")}])
def test_a_state_that_could_not_be_read_back_is_refused_when_it_is_offered(
    store: GatedStore, run_id: str, state: object
) -> None:
    """Not after a crash, when it is wanted: the message names what is in it and what to offer instead."""
    with CheckpointPublisher(store, run_id, attempt=1) as publisher:
        with pytest.raises(InvalidInputError, match=r"trainer_state holds (numpy|pathlib).*\.tolist\(\)"):
            publisher.offer(1, model_of(1), trainer_state={"rng": state})
        publisher.offer(1, model_of(1), trainer_state={"rng": [torch.get_rng_state(), random.getstate()]})

    (entry,) = log_of(store, run_id).lineage
    assert entry.files.keys() == {"model.safetensors", "trainer.pt"}


@pytest.mark.parametrize(
    "facts", [{"step": -1}, {"step": 1.5}, {"step": 1, "epoch": -1}, {"step": 1, "lr": math.nan}]
)
def test_a_number_that_is_none_is_refused_in_one_line(store: GatedStore, run_id: str, facts: Any) -> None:
    """Steps below 0, halves of steps and rates that are not finite: the next offer works."""
    with CheckpointPublisher(store, run_id, attempt=1) as publisher:
        with pytest.raises(InvalidInputError, match="whole numbers from 0 on") as caught:
            publisher.offer(**{"model": model_of(1), **facts})
        assert "\n" not in caught.value.message
        publisher.offer(1, model_of(1))

    assert [entry.step for entry in log_of(store, run_id).lineage] == [1]


def test_74_a_schedule_free_optimizer_in_train_mode_is_refused(store: GatedStore, run_id: str) -> None:
    """Weights that the optimizer does not stand for are not taken; after the call that is asked for, they are."""
    model = model_of(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with CheckpointPublisher(store, run_id) as publisher:
        optimizer.param_groups[0]["train_mode"] = True
        with pytest.raises(InvalidInputError, match=r"step 4 .*optimizer\.eval\(\)") as refused:
            publisher.offer(4, model, trainer_state={"optimizer": optimizer.state_dict()})
        optimizer.param_groups[0]["train_mode"] = False
        publisher.offer(5, model, trainer_state={"optimizer": optimizer.state_dict()})

    assert refused.value.code == "schedule_free_train_mode"
    assert [entry.step for entry in log_of(store, run_id).lineage] == [5]


def test_an_exception_after_an_offer_loses_nothing(store: GatedStore, run_id: str) -> None:
    """F19: user code that raises right after an offer leaves that checkpoint committed."""

    def user_code(publisher: CheckpointPublisher) -> None:
        publisher.offer(1, model_of(1.0))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), CheckpointPublisher(store, run_id, attempt=1) as publisher:
        user_code(publisher)

    assert [entry.step for entry in log_of(store, run_id).lineage] == [1]


def test_a_slow_store_makes_offers_wait_and_meters_it(store: GatedStore, run_id: str) -> None:
    """F20: with one snapshot in flight the next offer waits; the wait is in its entry and nothing is dropped."""
    store.gate.clear()
    offered: list[int] = []

    def offer_three(publisher: CheckpointPublisher) -> None:
        for step in (1, 2, 3):
            publisher.offer(step, model_of(step))
            offered.append(step)

    with CheckpointPublisher(store, run_id, attempt=1) as publisher:
        thread = threading.Thread(target=offer_three, args=(publisher,))
        thread.start()
        eventually(lambda: offered, what="the first offer")
        thread.join(3.0)
        assert offered == [1]
        store.gate.set()
        thread.join(60)

    entries = log_of(store, run_id).lineage
    assert [entry.step for entry in entries] == [1, 2, 3]
    assert entries[0].stall_s < entries[1].stall_s
    assert entries[1].stall_s > 1.0


def test_an_outage_is_retried_through(store: GatedStore, run_id: str) -> None:
    """A store that comes back before the deadline costs nothing but time."""
    store.num_failing_puts = 3

    with CheckpointPublisher(store, run_id, attempt=1) as publisher:
        publisher.offer(1, model_of(1.0))

    assert [entry.step for entry in log_of(store, run_id).lineage] == [1]


def test_a_lost_response_commits_once(store: GatedStore, run_id: str) -> None:
    """F4: a commit whose response was lost is recognised, not repeated."""
    store.num_failing_commits = 2

    with CheckpointPublisher(store, run_id, attempt=1) as publisher:
        publisher.offer(1, model_of(1.0))
        publisher.offer(2, model_of(2.0))

    assert [entry.step for entry in log_of(store, run_id).lineage] == [1, 2]


def test_an_outage_beyond_the_deadline_surfaces(store: GatedStore, run_id: str) -> None:
    """A checkpoint that cannot be uploaded in time fails the next offer and the close, naming the step."""
    store.num_failing_puts = 1_000_000
    publisher = CheckpointPublisher(store, run_id, attempt=1, upload_deadline_s=0.2)
    publisher.offer(5, model_of(1.0))

    with pytest.raises(StoreUnavailableError, match="step 5"):
        publisher.offer(6, model_of(2.0))
    with pytest.raises(StoreUnavailableError, match="step 5"):
        publisher.close()

    assert log_of(store, run_id).lineage == []


def test_f18_a_zombie_is_fenced(store: GatedStore, run_id: str) -> None:
    """F18: once a newer attempt has started, the older one's checkpoint is refused and it is told so."""
    publisher = CheckpointPublisher(store, run_id, attempt=1)
    start_attempt(store, run_id)

    publisher.offer(1, model_of(1.0))

    with pytest.raises(FencedError):
        publisher.close()
    assert log_of(store, run_id).lineage == []


def test_a_failed_attempt_cannot_commit_late(store: GatedStore, run_id: str) -> None:
    """A checkpoint that arrives after its attempt was recorded as failed does not bring the run back to life."""
    from wa_core.records import AttemptFailed, RunState

    publisher = CheckpointPublisher(store, run_id, attempt=1)
    log_of(store, run_id).append(AttemptFailed(reason="test"))

    publisher.offer(1, model_of(1.0))

    with pytest.raises(ConflictError):
        publisher.close()
    assert log_of(store, run_id).state is RunState.RECOVERING


def test_a_closed_publisher_refuses_offers(store: GatedStore, run_id: str) -> None:
    """Offering after close is an error, never a silent loss; closing twice is none."""
    publisher = CheckpointPublisher(store, run_id, attempt=1)
    publisher.close()
    publisher.close()

    with pytest.raises(InvalidInputError, match="closed"):
        publisher.offer(1, model_of(1.0))
