"""Bad inputs 65, 66 and 68: what a checkpoint's record alone says against it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from support.logs import DIGEST, checkpoint, open_log, submitted
from wa_core import layout
from wa_core.catalog.checkpoints import UnreadableCheckpoint, checkpoint_file, find_faults
from wa_core.errors import CorruptError
from wa_core.records import AttemptStarted, CheckpointCommitted, FileRef, RunState
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from wa_core.catalog.runs import RunLog

RUN = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
OTHER = "01ARZ3NDEKTSV4RRFFQ69G5FAW"
PLACE = f"runs/{RUN}/checkpoints/0001-000000000040-0123456789abcdef/"


def at(step: int, *, seq: int, key: str = PLACE + layout.MODEL_FILE) -> CheckpointCommitted:
    """A checkpoint whose weights are said to be at `key`."""
    ref = FileRef(key=key, size_bytes=8, sha256=DIGEST)
    return CheckpointCommitted(seq=seq, step=step, files={layout.MODEL_FILE: ref}, spec_digest=DIGEST)


def log_with(change: dict[str, Any] | bytes) -> RunLog:
    """The log of a run whose checkpoint entries are of steps 10, 20 (changed, or other bytes) and 30."""
    store = MemoryStore()
    run_id = submitted(store)
    log = open_log(store, run_id)
    log.append(AttemptStarted(runner_id="r"))
    for step in (10, 20, 30):
        entry = log.append(checkpoint(step))
        if step == 20:
            written = json.loads(entry.model_dump_json())
            body = change if isinstance(change, bytes) else json.dumps(written | change).encode()
            store.put(layout.log_entry(run_id, entry.seq), body)
    return open_log(store, run_id)


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"format": "1"}, {"shards": 4}, {"files": [1]}, {"metrics": {"loss": "low"}}, {"at": "noon"}],
)
def test_65_a_checkpoint_record_of_an_unknown_version_does_not_end_the_log(change: dict[str, Any]) -> None:
    """The log reads on; the checkpoint keeps its place on the path, and its fault is `record_unreadable`."""
    log = log_with(change)

    log.refresh()

    assert [entry.step for entry in log.lineage] == [10, 20, 30]
    unreadable = log.lineage[1]
    assert isinstance(unreadable, UnreadableCheckpoint)
    assert (unreadable.seq, unreadable.attempt, unreadable.state) == (4, 1, RunState.RUNNING)
    with pytest.raises(CorruptError, match=r"log/0000000004\.json.*another version") as caught:
        checkpoint_file(log.run_id, unreadable)
    assert caught.value.code == "record_unreadable"


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "attempt_merged"},
        {"kind": "attempt_started", "format": 2},
        {"format": 2, "step": -1},
        {"format": 2, "step": None},
        {"format": 2, "state": "resting"},
        b'{"kind": "checkpoint", "seq": 4, "attempt": 1, "state": "running"}',
        b"[" * 100_000,
        b'"kind": "checkpoint"',
    ],
)
def test_65_other_records_are_never_guessed_at(change: dict[str, Any] | bytes) -> None:
    """Where a run's state could depend on what is not understood, the log is refused with its key."""
    log = log_with(change)

    with pytest.raises(CorruptError, match=r"log/0000000004\.json") as caught:
        log.refresh()

    assert caught.value.code == "record_unreadable"


@pytest.mark.parametrize(
    "key",
    [
        f"runs/{OTHER}/checkpoints/0001-000000000040-0123456789abcdef/model.safetensors",
        f"runs/{RUN}/averages/swa/blobs/0123456789abcdef/model.safetensors",
        f"runs/{RUN}/run.json",
        f"runs/{RUN}/checkpoints/model.safetensors",
        f"runs/{RUN}/checkpoints/../../{OTHER}/checkpoints/0001-000000000040-0123456789abcdef/model.safetensors",
        PLACE,
        PLACE + "..",
        PLACE + "a/model.safetensors",
        PLACE + "a\0b",
        PLACE + "model.safetensors\n",
        f"/{PLACE}model.safetensors",
        f"s3://bucket/{PLACE}model.safetensors",
        "",
    ],
)
def test_66_a_record_that_points_outside_of_its_run_is_refused(key: str) -> None:
    """Another run, another folder, a way round or another bucket: `foreign_key`, on one line, before any read."""
    with pytest.raises(CorruptError, match="step 40") as caught:
        checkpoint_file(RUN, at(40, seq=3, key=key))

    assert caught.value.code == "foreign_key"
    assert "\n" not in caught.value.message
    assert caught.value.message.isprintable()


def test_66_a_record_that_points_into_its_run_is_followed() -> None:
    """The key that a publisher writes, of any attempt and step, is taken."""
    for attempt, step in ((1, 40), (12345, 10**12)):
        prefix = layout.checkpoint_prefix(RUN, attempt=attempt, step=step, nonce=layout.new_nonce())
        entry = at(step, seq=3, key=prefix + layout.MODEL_FILE)
        assert checkpoint_file(RUN, entry) == entry.files[layout.MODEL_FILE]


def test_67_a_record_without_weights_is_refused() -> None:
    """A checkpoint that lists no weights has the code of one whose weights are gone."""
    with pytest.raises(CorruptError, match=r"lists no model\.safetensors") as caught:
        checkpoint_file(RUN, checkpoint(40))

    assert caught.value.code == "object_missing"


def test_68_steps_that_go_backwards_are_faults() -> None:
    """A step at or below an earlier one of the path is a fault; one above all of them is not."""
    steps = {3: 10, 4: 30, 5: 20, 6: 30, 7: 31}

    faults = find_faults(RUN, [at(step, seq=seq) for seq, step in steps.items()])

    assert {seq: fault.code for seq, fault in faults.items()} == {5: "step_backwards", 6: "step_backwards"}
    assert "step 20 comes after step 30" in faults[5].message


def test_faults_of_a_path_are_found_together() -> None:
    """Each fault is under its entry's seq; a record that is not believed makes no later step a step back."""
    unreadable = UnreadableCheckpoint(seq=4, attempt=1, state=RunState.RUNNING, step=900, problem="of format 2")
    path = [at(10, seq=3), unreadable, at(800, seq=5, key="runs/elsewhere"), checkpoint(20), at(30, seq=7)]

    found = find_faults(RUN, path)

    assert {seq: fault.code for seq, fault in found.items()} == {
        4: "record_unreadable",
        5: "foreign_key",
        0: "object_missing",
    }
