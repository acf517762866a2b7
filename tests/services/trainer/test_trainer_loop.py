"""The training loop: exact recovery, checkpoints, cancel, logs and metrics."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from services.trainer.context import TrainContext
from services.trainer.loop import TrainOutcome, train
from support.hostile import Canary
from support.patience import eventually
from support.training import (
    differing_tensors,
    digits_request,
    log_of,
    start_attempt,
    submit_run,
    train_with_gloo,
    weights_of,
)
from wa_core import layout
from wa_core.catalog.files import put_file
from wa_core.catalog.packages import put_package
from wa_core.errors import CorruptError, FencedError
from wa_core.packages import pack_folder
from wa_core.records import (
    AttemptStarted,
    CancelRequested,
    CheckpointCommitted,
    Heartbeat,
    PauseRequested,
    ResumeRequested,
    RunRequest,
    RunState,
)
from wa_core.store.local import LocalStore
from wa_core.store.memory import MemoryStore
from wa_core.tensors import pickled

if TYPE_CHECKING:
    from collections.abc import Callable


def endless_run() -> tuple[MemoryStore, str, int]:
    """A run that would train for hours, without checkpoints on the way, in its first attempt."""
    store = MemoryStore()
    run_id = submit_run(store, digits_request(every_steps=10_000, epochs=10_000))
    return store, run_id, start_attempt(store, run_id)


def train_until(
    store: MemoryStore, run_id: str, attempt: int, *, happens: Callable[[], object]
) -> TrainOutcome | FencedError:
    """How an attempt ends after something has happened while it was training."""
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train, TrainContext(store, run_id, attempt))
        _wait_for_step(store, run_id)
        happens()
        try:
            return training.result(timeout=120)
        except FencedError as error:
            return error


def test_checkpoints_are_committed_every_n_steps_and_at_the_end() -> None:
    """Each `every_steps`-th step and the last one is in the run log, with its files in the bucket."""
    store = MemoryStore()
    run_id = submit_run(store, digits_request(every_steps=4))

    outcome = train(TrainContext(store, run_id, start_attempt(store, run_id)))

    checkpoints = log_of(store, run_id).lineage
    assert [entry.step for entry in checkpoints] == [4, 8, 11]
    assert (outcome.step, outcome.total_steps, outcome.is_stopped) == (11, 11, False)
    for entry in checkpoints:
        assert set(entry.files) == {"model.safetensors", "trainer.pt"}
        assert all(store.head(ref.key).size_bytes == ref.size_bytes for ref in entry.files.values())
        assert entry.lr is not None
        assert entry.metrics["loss"] > 0


def test_a_resumed_run_ends_bit_identical() -> None:
    """F15: resuming at any checkpoint gives the very weights that an undisturbed run has."""
    store = MemoryStore()
    undisturbed = submit_run(store, digits_request())
    train(TrainContext(store, undisturbed, start_attempt(store, undisturbed)))
    expected = weights_of(store, log_of(store, undisturbed).lineage[-1])

    run_id = submit_run(store, digits_request())
    train(TrainContext(store, run_id, start_attempt(store, run_id)))
    middle = log_of(store, run_id).lineage[1]
    train(TrainContext(store, run_id, start_attempt(store, run_id, resumed_from=middle.seq)))

    resumed = log_of(store, run_id).lineage
    assert [entry.step for entry in resumed] == [4, 8, 11]
    assert resumed[-1].attempt == 2
    assert differing_tensors(weights_of(store, resumed[-1]), expected) == []


def test_two_gloo_workers_resume_bit_identical(tmp_path: Path) -> None:
    """F15 under DDP: two workers that resume at a checkpoint end where two undisturbed ones end."""
    store = LocalStore(tmp_path)
    run_id = submit_run(store, digits_request(num_workers=2))
    train_with_gloo(store, run_id, attempt=start_attempt(store, run_id), world_size=2)
    first = log_of(store, run_id).lineage

    attempt = start_attempt(store, run_id, resumed_from=first[0].seq)
    train_with_gloo(store, run_id, attempt=attempt, world_size=2)

    second = log_of(store, run_id).lineage
    assert [entry.step for entry in second] == [entry.step for entry in first] == [4, 8, 11]
    assert differing_tensors(weights_of(store, second[-1]), weights_of(store, first[-1])) == []
    assert list(store.list(layout.logs_prefix(run_id, attempt=1, rank=1)))


def test_a_resumed_run_at_its_last_step_does_nothing_more() -> None:
    """An attempt that failed after its last checkpoint is finished by one that trains no step."""
    store = MemoryStore()
    run_id = submit_run(store, digits_request())
    train(TrainContext(store, run_id, start_attempt(store, run_id)))
    last = log_of(store, run_id).lineage[-1]

    outcome = train(TrainContext(store, run_id, start_attempt(store, run_id, resumed_from=last.seq)))

    assert (outcome.step, outcome.is_stopped) == (11, False)
    assert log_of(store, run_id).lineage[-1].seq == last.seq


def test_a_cancelled_run_stops_at_a_step_after_a_last_checkpoint() -> None:
    """Cancel ends training within seconds, and the weights of the step where it stopped are committed."""
    store, run_id, attempt = endless_run()

    outcome = train_until(store, run_id, attempt, happens=lambda: log_of(store, run_id).append(CancelRequested()))

    assert isinstance(outcome, TrainOutcome)
    assert outcome.is_stopped
    assert [entry.step for entry in log_of(store, run_id).lineage] == [outcome.step]


def test_a_paused_run_keeps_the_weights_of_the_step_where_it_stopped() -> None:
    """Pause ends training at a step, after a checkpoint of just that step."""
    store, run_id, attempt = endless_run()

    outcome = train_until(store, run_id, attempt, happens=lambda: log_of(store, run_id).append(PauseRequested()))

    assert isinstance(outcome, TrainOutcome)
    assert outcome.is_stopped
    assert [entry.step for entry in log_of(store, run_id).lineage] == [outcome.step]
    assert log_of(store, run_id).state is RunState.PAUSING


def test_f17_a_rewound_attempt_stops_and_commits_nothing_more() -> None:
    """F17: an attempt whose run is to go on from an older step ends at a step boundary, as if fenced."""
    store, run_id, attempt = endless_run()
    wish = ResumeRequested(from_step=0)

    outcome = train_until(store, run_id, attempt, happens=lambda: log_of(store, run_id).append(wish))

    assert isinstance(outcome, FencedError)
    assert log_of(store, run_id).lineage == []


def test_a_pause_and_a_rewind_with_changes_are_exact() -> None:
    """Going back with other rates and other data is the run that had them from that step on, bit for bit."""
    store = MemoryStore()
    run_id = submit_run(store, digits_request())
    train(TrainContext(store, run_id, start_attempt(store, run_id)))
    first = log_of(store, run_id).lineage[0]

    def go_back(**changes: float) -> list[CheckpointCommitted]:
        log = log_of(store, run_id)
        log.append(ResumeRequested(from_step=first.step, **changes))
        attempt = log.append(AttemptStarted(runner_id="test", resumed_from=first.seq)).attempt
        train(TrainContext(store, run_id, attempt))
        return log_of(store, run_id).lineage

    undisturbed = go_back()
    halved = go_back(lr_scale=0.5, skip_batches=2)
    again = go_back(lr_scale=0.5, skip_batches=2)
    still = go_back()

    assert [entry.step for entry in halved] == [entry.step for entry in undisturbed] == [4, 8, 11]
    assert halved[-1].lr == pytest.approx(undisturbed[-1].lr / 2)
    last = [weights_of(store, entries[-1]) for entries in (undisturbed, halved, again, still)]
    assert differing_tensors(last[0], last[1]) != []
    assert differing_tensors(last[1], last[2]) == []
    assert differing_tensors(last[0], last[3]) == []


def test_f18_a_newer_attempt_ends_the_older_one() -> None:
    """F18: an attempt that has been taken over stops with `FencedError` and commits nothing more."""
    store, run_id, attempt = endless_run()

    outcome = train_until(store, run_id, attempt, happens=lambda: start_attempt(store, run_id))

    assert isinstance(outcome, FencedError)
    assert log_of(store, run_id).lineage == []


def test_a_damaged_checkpoint_is_not_resumed_from() -> None:
    """A checkpoint whose bytes are not what was recorded, or gone, is refused, naming the object."""
    store = MemoryStore()
    run_id = submit_run(store, digits_request())
    train(TrainContext(store, run_id, start_attempt(store, run_id)))
    first = log_of(store, run_id).lineage[0]
    key = first.files["trainer.pt"].key
    store.put(key, b"x" + store.get(key)[1:])

    with pytest.raises(CorruptError, match=r"trainer\.pt"):
        train(TrainContext(store, run_id, start_attempt(store, run_id, resumed_from=first.seq)))
    store.delete(key)
    with pytest.raises(CorruptError, match=r"trainer\.pt is recorded but absent"):
        train(TrainContext(store, run_id, start_attempt(store, run_id, resumed_from=first.seq)))


def test_66_a_checkpoint_of_another_run_is_not_resumed_from() -> None:
    """A record that points into another run, even to sound files, is refused before they are read."""
    store = MemoryStore()
    other, run_id = (submit_run(store, digits_request()) for _ in range(2))
    train(TrainContext(store, other, start_attempt(store, other)))
    elsewhere = log_of(store, other).lineage[0]
    start_attempt(store, run_id)
    entry = CheckpointCommitted(step=4, files=elsewhere.files, spec_digest=elsewhere.spec_digest)
    foreign = log_of(store, run_id).append(entry)

    with pytest.raises(CorruptError, match=other) as caught:
        train(TrainContext(store, run_id, start_attempt(store, run_id, resumed_from=foreign.seq)))

    assert caught.value.code == "foreign_key"


def test_69_a_hostile_training_state_runs_nothing(tmp_path: Path) -> None:
    """A trainer.pt whose pickle would run a command is refused by name, and its canary is never made."""
    store = MemoryStore()
    run_id = submit_run(store, digits_request())
    train(TrainContext(store, run_id, start_attempt(store, run_id)))
    sound = log_of(store, run_id).lineage[0]
    canary = tmp_path / "canary"
    ref = put_file(store, sound.files["trainer.pt"].key, pickled({"optimizer": Canary(canary)}))
    start_attempt(store, run_id)
    entry = CheckpointCommitted(step=4, files=sound.files | {"trainer.pt": ref}, spec_digest=sound.spec_digest)
    hostile = log_of(store, run_id).append(entry)

    with pytest.raises(CorruptError, match=r"step 4.*posix\.system") as caught:
        train(TrainContext(store, run_id, start_attempt(store, run_id, resumed_from=hostile.seq)))

    assert caught.value.code == "unsafe_pickle"
    assert not canary.exists()


def test_a_packaged_recipe_is_trained_and_leaves_no_files(tmp_path: Path) -> None:
    """A run's package is unpacked in the scratch folder for as long as it is trained."""
    store = MemoryStore()
    package = put_package(store, pack_folder(Path(__file__).parents[3] / "examples" / "moons"))
    request = RunRequest(recipe="moons:Moons", package=package, config={"epochs": 1, "batch_size": 512})
    run_id = submit_run(store, request)

    try:
        outcome = train(TrainContext(store, run_id, start_attempt(store, run_id), scratch_dir=tmp_path))
    finally:
        sys.modules.pop("moons", None)
        sys.path[:] = [entry for entry in sys.path if "wa-code-" not in entry]

    assert (outcome.step, outcome.total_steps) == (2, 2)
    assert log_of(store, run_id).lineage[-1].is_last
    assert not list(tmp_path.iterdir())


def test_metrics_heartbeat_and_logs_reach_the_bucket() -> None:
    """Every step has a metric line, the heartbeat ends at the last step, and the log says what happened."""
    store = MemoryStore()
    run_id = submit_run(store, digits_request())

    train(TrainContext(store, run_id, start_attempt(store, run_id)))

    parts = [store.get(info.key).decode() for info in store.list(layout.metrics_prefix(run_id))]
    lines = [json.loads(line) for part in parts for line in part.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 12))
    assert set(lines[0]) == {"step", "epoch", "loss", "lr", "at"}
    heartbeat = Heartbeat.model_validate_json(store.get(layout.heartbeat(run_id, "trainer")))
    assert (heartbeat.step, heartbeat.total_steps, heartbeat.attempt) == (11, 11, 1)
    assert heartbeat.steps_per_s
    text = "".join(
        store.get(info.key).decode() for info in store.list(layout.logs_prefix(run_id, attempt=1, rank=0))
    )
    assert "starting at step 0 of 11" in text
    assert "done at step 11 of 11" in text


def _wait_for_step(store: MemoryStore, run_id: str) -> None:
    key = layout.heartbeat(run_id, "trainer")
    eventually(
        lambda: list(store.list(key)) and Heartbeat.model_validate_json(store.get(key)).step,
        what="the first step",
    )
