"""Runs of one's own: registered, shown, averaged, stopped, failed and resumed, and never taken by a runner."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn import functional

from support.averaging import newest_assessment
from support.hostile import Canary
from support.own import assert_is_mean_of_checkpoints, average_to_end, batches, small_model
from support.patience import eventually
from support.training import differing_tensors, digits_request, log_of, start_attempt, submit_run
from wa_core import register_run, resume_run
from wa_core.catalog.files import put_file
from wa_core.catalog.runs import fetch_spec, list_active, list_queue
from wa_core.errors import (
    AlreadyFinishedError,
    ConflictError,
    CorruptError,
    FencedError,
    InvalidInputError,
    RunNotFoundError,
)
from wa_core.publisher.restore import load_trainer_state
from wa_core.records import CancelRequested, Failed, Heartbeat, PauseRequested, RunState
from wa_core.store.local import LocalStore
from wa_core.store.memory import MemoryStore
from wa_core.tensors import pickled

if TYPE_CHECKING:
    from pathlib import Path

    from wa_core.publisher import OwnRun
    from wa_core.store.base import ObjectStore

NUM_STEPS = 12
LOST = """
import os, signal, sys
from pathlib import Path
import torch
from wa_core import LocalStore, register_run

run = register_run(LocalStore(Path(sys.argv[1])))
run.offer(1, {"w": torch.ones(3)}, trainer_state={"lr": 0.1})
run._publisher.close()
print(run.run_id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def train(run: OwnRun, *, until: int, every: int = 2, error: type[Exception] | None = None) -> nn.Module:
    """Train the small model with momentum, from where the run stands; then raise, if asked to."""
    torch.manual_seed(0)
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = 0
    if run.restored is not None:
        model.load_state_dict(run.restored.weights)
        optimizer.load_state_dict(run.restored.trainer_state["optimizer"])
        step = run.restored.step
    for inputs, labels in batches(NUM_STEPS)[step:until]:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        step += 1
        if step % every == 0:
            run.offer(
                step, model, metrics={"loss": loss.item()}, trainer_state={"optimizer": optimizer.state_dict()}
            )
    if error is not None:
        raise error
    return model


def offer_and_raise(run: OwnRun, *steps: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """What user code does that goes wrong after some checkpoints."""
    for step in steps:
        run.offer(step, {"w": torch.ones(3)}, trainer_state={})
    raise error("on purpose")


def test_a_plain_loop_ends_in_an_average(tmp_path: Path) -> None:
    """A loop of plain torch registers a run, offers checkpoints, and its mean is there to be downloaded."""
    store = LocalStore(tmp_path)

    with register_run(store, averages={"swa": "swa:start_step=3"}, labels={"team": "own"}, total_steps=10) as run:
        train(run, until=10)

    assert log_of(store, run.run_id).state is RunState.FINALIZING
    average_to_end(store, run.run_id)
    parameters = [name for name, _ in small_model().named_parameters()]
    assert_is_mean_of_checkpoints(store, run.run_id, "swa", steps=[4, 6, 8, 10], parameters=parameters)
    assessment = newest_assessment(store, run.run_id, "swa").assessment
    assert assessment.batchnorm.code == "no_recipe"
    assert "no recipe" in assessment.batchnorm.message
    assert assessment.averaged is None


def test_a_registered_run_looks_like_any_other(tmp_path: Path) -> None:
    """It is active, not queued, starts at once, says how far it is, and its spec says who trains it."""
    store = LocalStore(tmp_path)

    with register_run(store, labels={"team": "own"}, total_steps=10) as run:
        run.report(3, epoch=1, metrics={"loss": 0.5, "bad": float("nan")})
        assert list(list_active(store)) == [run.run_id]
        assert list(list_queue(store)) == []
        assert log_of(store, run.run_id).state is RunState.STARTING

    spec = fetch_spec(store, run.run_id)
    assert (spec.trainer, spec.request.labels) == ("own", {"team": "own"})
    beat = Heartbeat.model_validate_json(store.get(f"runs/{run.run_id}/heartbeats/trainer.json"))
    assert (beat.step, beat.epoch, beat.total_steps, beat.metrics) == (3, 1, 10, {"loss": 0.5})


def test_a_resumed_loop_ends_bit_identical(tmp_path: Path) -> None:
    """F17: going on from an older committed checkpoint gives the very weights of an undisturbed loop."""
    store = LocalStore(tmp_path)
    with register_run(store) as undisturbed:
        expected = train(undisturbed, until=12).state_dict()
    with pytest.raises(ZeroDivisionError), register_run(store, max_failures=1) as run:
        train(run, until=6, error=ZeroDivisionError)
    assert log_of(store, run.run_id).state is RunState.RECOVERING

    with resume_run(store, run.run_id, from_step=5) as resumed:
        assert resumed.restored is not None
        assert (resumed.attempt, resumed.restored.step) == (2, 4)
        found = train(resumed, until=12).state_dict()

    assert differing_tensors(found, expected) == []
    assert [entry.step for entry in log_of(store, run.run_id).lineage] == [2, 4, 6, 8, 10, 12]
    average_to_end(store, run.run_id)


def test_a_killed_trainer_leaves_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    """SIGKILL at any moment: the run stays as it was, and the next attempt begins at the last checkpoint."""
    store = LocalStore(tmp_path)
    killed = subprocess.run(
        [sys.executable, "-c", LOST, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=False
    )
    run_id = killed.stdout.strip()
    assert log_of(store, run_id).state is RunState.RUNNING

    with resume_run(store, run_id) as run:
        assert run.restored is not None
        assert (run.restored.step, run.restored.trainer_state) == (1, {"lr": 0.1})
        run.offer(2, {"w": torch.zeros(3)})

    entries = log_of(store, run_id).entries
    assert [entry.kind for entry in entries] == [
        "submitted", "attempt_started", "checkpoint", "attempt_failed", "attempt_started", "checkpoint",
        "training_finished",
    ]  # fmt: skip


def test_an_exception_fails_the_run_with_its_reason(tmp_path: Path) -> None:
    """F19: what was offered is committed, the run has failed, and its reason is the exception."""
    store = LocalStore(tmp_path)

    with pytest.raises(ZeroDivisionError), register_run(store) as run:
        offer_and_raise(run, 1, error=ZeroDivisionError)

    log = log_of(store, run.run_id)
    assert [entry.step for entry in log.lineage] == [1]
    last = log.entries[-1]
    assert isinstance(last, Failed)
    assert (last.reason, last.message) == (
        "trainer_failed",
        "ZeroDivisionError: on purpose",
    )
    with pytest.raises(AlreadyFinishedError):
        resume_run(store, run.run_id)


def test_an_interrupt_is_no_failure(tmp_path: Path) -> None:
    """Ctrl-C keeps what was offered and leaves a run that can be resumed, whatever its budget."""
    store = LocalStore(tmp_path)

    with pytest.raises(KeyboardInterrupt), register_run(store) as run:
        offer_and_raise(run, 1)

    assert log_of(store, run.run_id).state is RunState.RECOVERING
    with resume_run(store, run.run_id) as resumed:
        assert resumed.restored is not None
        assert resumed.restored.step == 1


def test_an_owner_can_cancel(tmp_path: Path) -> None:
    """The loop hears of a cancel, and its end is the run's: cancelled, with what was offered committed."""
    store = LocalStore(tmp_path)

    with register_run(store) as run:
        log_of(store, run.run_id).append(CancelRequested())
        eventually(lambda: run.is_stop_wanted, what="the wish to stop")
        run.offer(7, {"w": torch.ones(3)})

    log = log_of(store, run.run_id)
    assert (log.state, [entry.step for entry in log.lineage]) == (RunState.CANCELLED, [7])


def test_an_owner_can_pause_and_go_on(tmp_path: Path) -> None:
    """A pause ends the attempt and not the run; resuming takes the wish back."""
    store = LocalStore(tmp_path)

    with register_run(store) as run:
        run.offer(1, {"w": torch.ones(3)})
        log_of(store, run.run_id).append(PauseRequested())
        eventually(lambda: run.is_stop_wanted, what="the wish to stop")
    assert log_of(store, run.run_id).state is RunState.PAUSED
    with resume_run(store, run.run_id) as resumed:
        resumed.offer(2, {"w": torch.ones(3)})

    assert log_of(store, run.run_id).state is RunState.FINALIZING


def test_f18_an_attempt_that_was_taken_over_is_told(tmp_path: Path) -> None:
    """F18: once somebody has resumed the run, the older loop is asked to stop and what it offers is refused."""
    store = LocalStore(tmp_path)
    older = register_run(store)
    newer = resume_run(store, older.run_id)

    eventually(lambda: older.is_stop_wanted, what="the wish to stop")
    older.offer(1, {"w": torch.ones(3)})
    with pytest.raises(FencedError):
        older.finish()
    newer.finish()

    assert log_of(store, older.run_id).state is RunState.FINALIZING


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"averages": {"Bad Name": "swa"}}, "name"),
        ({"averages": {"a": "swaa"}}, "swa"),
        ({"averages": {"a": "ema:decay=1.5"}}, "decay"),
        ({"labels": {"Bad Name": "x"}}, "labels"),
        ({"recipe": "no recipe"}, "recipe"),
        ({"max_failures": -1}, "max_failures"),
    ],
)
def test_what_cannot_be_registered_makes_no_run(options: dict[str, object], message: str) -> None:
    """A name or rule that cannot be one is refused with its place, before anything is written."""
    store = MemoryStore()

    with pytest.raises(InvalidInputError, match=message):
        register_run(store, **options)  # type: ignore[arg-type]

    assert list(store.list("")) == []


def test_only_runs_of_ones_own_are_resumed() -> None:
    """A run that the service trains, one that is not there and a step before all checkpoints are refused."""
    store = MemoryStore()
    served = submit_run(store, digits_request())
    start_attempt(store, served)
    with pytest.raises(ConflictError, match="trained by the service"):
        resume_run(store, served)
    with pytest.raises(RunNotFoundError):
        resume_run(store, "nothing")
    with register_run(store, max_failures=1) as run:
        run.offer(4, {"w": torch.ones(3)})
        with pytest.raises(InvalidInputError, match=r"as old as step 3; there are: 4|there are: none"):
            resume_run(store, run.run_id, from_step=3)


def test_64_a_damaged_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    """Weights whose bytes are not those recorded are refused; an older checkpoint can be named instead."""
    store = LocalStore(tmp_path)
    with pytest.raises(KeyboardInterrupt), register_run(store) as run:
        offer_and_raise(run, 1, 2)
    ref = log_of(store, run.run_id).lineage[1].files["model.safetensors"]
    body = bytearray(store.get(ref.key))
    body[-1] ^= 1
    store.put(ref.key, bytes(body))

    with pytest.raises(CorruptError, match="sha256"):
        resume_run(store, run.run_id)
    with resume_run(store, run.run_id, from_step=1) as resumed:
        assert resumed.restored is not None
        assert resumed.restored.step == 1


def replaced_state(store: ObjectStore, run_id: str, body: bytes) -> None:
    """Another `trainer.pt` under the newest checkpoint, recorded as if it had been offered."""
    log = log_of(store, run_id)
    entry = log.lineage[-1]
    file = put_file(store, entry.files["trainer.pt"].key, body)
    log.append(
        entry.model_copy(update={"step": 2, "files": entry.files | {"trainer.pt": file}, "write_id": "0" * 32})
    )


def test_69_a_hostile_training_state_runs_nothing(tmp_path: Path) -> None:
    """A pickle that wants to run something is refused by name, and has run nothing."""
    store, canary = LocalStore(tmp_path / "bucket"), tmp_path / "canary"
    with pytest.raises(KeyboardInterrupt), register_run(store) as run:
        offer_and_raise(run, 1)
    replaced_state(store, run.run_id, pickled({"optimizer": Canary(canary)}))

    with pytest.raises(CorruptError) as refused:
        resume_run(store, run.run_id)

    assert refused.value.code == "unsafe_pickle"
    assert not canary.exists()


def test_70_a_training_state_that_claims_64_gib_is_refused(tmp_path: Path) -> None:
    """A view that repeats one number 16 billion times is refused before anybody copies it."""
    path = tmp_path / "trainer.pt"
    path.write_bytes(pickled({"momentum": torch.ones(1).expand(1 << 34)}))

    with pytest.raises(CorruptError) as refused:
        load_trainer_state(path)

    assert refused.value.code == "expanded_tensor"


def test_71_a_compressed_training_state_is_refused(tmp_path: Path) -> None:
    """An archive that is deflated, as `torch.save` never does, is not unpacked."""
    import zipfile

    path = tmp_path / "trainer.pt"
    with (
        zipfile.ZipFile(io.BytesIO(pickled({"m": torch.zeros(1 << 20)}))) as plain,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))

    with pytest.raises(CorruptError) as refused:
        load_trainer_state(path)

    assert refused.value.code == "compressed_archive"
