"""F27: a bucket that format 1 wrote is read by every later version, and what is newer is refused clearly."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from support.averaging import averager, run_until_idle
from support.runs import HandmadeRun, random_weights
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.catalog.files import put_file
from wa_core.catalog.retention import Keep
from wa_core.catalog.runs import RunLog, fetch_spec, list_active, list_queue, list_run_ids, requested_averages
from wa_core.catalog.sweeper import Sweeper
from wa_core.clock import ManualClock
from wa_core.errors import CorruptError
from wa_core.records import AVERAGER, CheckpointCommitted, Heartbeat, Marker, TrainingFinished
from wa_core.store.local import LocalStore
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from collections.abc import Mapping

FROZEN = Path(__file__).parents[1] / "data" / "format-v1"
RUNS: dict[str, str] = json.loads((FROZEN / "runs.json").read_text())
KINDS = {
    "submitted",
    "attempt_started",
    "checkpoint",
    "pause_requested",
    "paused",
    "resume_requested",
    "cancel_requested",
    "attempt_failed",
    "training_finished",
    "succeeded",
    "failed",
    "cancelled",
    "average_added",
}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A copy of the frozen bucket."""
    shutil.copytree(FROZEN / "bucket", tmp_path / "bucket")
    return LocalStore(tmp_path / "bucket")


def read_log(store: LocalStore, run_id: str) -> RunLog:
    """A run's whole log."""
    log = RunLog(store, run_id, clock=ManualClock())
    log.refresh()
    return log


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """The float tensors of a file, in float64."""
    return {name: tensor.double() for name, tensor in load_file(path).items() if tensor.is_floating_point()}


def test_f27_every_record_of_the_frozen_bucket_is_read(store: LocalStore) -> None:
    """Each run's spec, log, generations, assessments, markers and heartbeats; with every kind of log entry."""
    kinds, states = set(), {}
    for name, run_id in RUNS.items():
        spec, log = fetch_spec(store, run_id), read_log(store, run_id)
        kinds |= {entry.kind for entry in log.entries}
        states[name] = str(log.state)
        for asked in requested_averages(spec, log.entries):
            generations = Generations(store, run_id, asked.name)
            assert [found.name for found in generations.newest_first()] == [asked.name] * len(
                generations.numbers()
            )
            assert all(generations.fetch_assessment(number) for number in generations.assessed_numbers())
    assert kinds == KINDS
    assert states == {name: name for name in ("succeeded", "running", "cancelled", "failed")}
    assert sorted(list_run_ids(store)) == sorted(RUNS.values())
    assert len(list(list_active(store))) == len(list(list_queue(store))) == 3
    for info in [*store.list("active/"), *store.list("queue/")]:
        Marker.model_validate_json(store.get(info.key))
    for who in ("trainer", "averager"):
        Heartbeat.model_validate_json(store.get(layout.heartbeat(RUNS["succeeded"], who)))


def test_f27_every_file_that_the_frozen_records_name_is_what_they_say(store: LocalStore) -> None:
    """Sizes and digests of checkpoints, states and served files."""
    run_id = RUNS["succeeded"]
    log = read_log(store, run_id)
    refs = [ref for entry in log.lineage for ref in entry.files.values()]
    for asked in requested_averages(fetch_spec(store, run_id), log.entries):
        generations = Generations(store, run_id, asked.name)
        refs += [found.shadow for found in generations.newest_first() if found.shadow]
        records = [generations.fetch_assessment(number) for number in generations.assessed_numbers()]
        refs += [ref for record in records if record for ref in record.files.values()]
    assert len(refs) > 20
    for ref in refs:
        body = store.get(ref.key)
        assert (len(body), hashlib.sha256(body).hexdigest()) == (ref.size_bytes, ref.sha256)


def test_f27_the_frozen_averages_are_the_mean_of_the_surviving_path(store: LocalStore, tmp_path: Path) -> None:
    """After the rewind step 30 is the second attempt's, step 40 was rejected, and step 10 is before the start."""
    run_id = RUNS["succeeded"]
    log = read_log(store, run_id)
    path = {entry.step: tmp_path / "bucket" / entry.files[layout.MODEL_FILE].key for entry in log.lineage}
    newest = Generations(store, run_id, "swa").newest()
    served = Generations(store, run_id, "swa").newest_assessment()
    assert newest is not None
    assert served is not None

    expected = [weights_of(path[step]) for step in (20, 30, 50)]
    found = weights_of(tmp_path / "bucket" / served.files[layout.MODEL_FILE].key)

    assert [(aside.step, aside.code) for aside in newest.rejected] == [(40, "not_finite")]
    assert [(aside.step, aside.code) for aside in newest.skipped] == [(10, "before_start")]
    assert newest.coefficients == pytest.approx({20: 1 / 3, 30: 1 / 3, 50: 1 / 3})
    for name in set(found) - {"bn.running_mean"}:  # pooled, not averaged
        mean = torch.stack([weights[name] for weights in expected]).mean(0)
        assert torch.allclose(found[name], mean, atol=1e-7)


def test_f27_an_averager_goes_on_with_the_frozen_run(store: LocalStore, tmp_path: Path) -> None:
    """A state that format 1 stored is folded on: with one more checkpoint the average is the mean of all three."""
    run_id = RUNS["running"]
    log = read_log(store, run_id)
    body = serialize(random_weights(30))
    key = layout.checkpoint_prefix(run_id, attempt=1, step=30, nonce=layout.new_nonce()) + layout.MODEL_FILE
    files = {layout.MODEL_FILE: put_file(store, key, body)}
    log.append(CheckpointCommitted(step=30, files=files, spec_digest=log.lineage[0].spec_digest))
    log.append(TrainingFinished(step=30))

    run_until_idle(averager(store))

    assert read_log(store, run_id).state == "succeeded"
    served = Generations(store, run_id, "swa").newest_assessment()
    assert served is not None
    found = weights_of(tmp_path / "bucket" / served.files[layout.MODEL_FILE].key)
    paths = [tmp_path / "bucket" / entry.files[layout.MODEL_FILE].key for entry in log.lineage]
    assert len(paths) == 3
    for name in set(found) - {"bn.running_mean"}:
        mean = torch.stack([weights_of(path)[name] for path in paths]).mean(0)
        assert torch.allclose(found[name], mean, atol=1e-7)


def test_f27_the_frozen_run_can_be_swept(store: LocalStore) -> None:
    """Its policy lets the abandoned checkpoint go, and no record."""
    run_id = RUNS["succeeded"]
    report = Sweeper(store, run_id, clock=ManualClock()).sweep(is_dry_run=True, is_whole=True)
    abandoned = next(key for key in report.verdicts if "/checkpoints/0001-000000000030-" in key)
    assert report.verdicts[abandoned].reason.startswith("abandoned")
    records = [key for key in report.verdicts if key.endswith(".json")]
    assert all(isinstance(report.verdicts[key], Keep) for key in records)


NEWER: dict[str, Mapping[str, Any]] = {
    "format 2": {"format": 2},
    "an unknown kind": {"kind": "teleported"},
    "an unknown field": {"colour": "blue"},
}


@pytest.mark.parametrize("change", NEWER.values(), ids=list(NEWER))
def test_f27_a_newer_log_entry_is_refused(change: Mapping[str, Any], store: LocalStore) -> None:
    """A log with a record that this version does not know is not read past it, and the message says where."""
    key = layout.log_entry(RUNS["failed"], 2)
    store.put(key, json.dumps(json.loads(store.get(key)) | change).encode())

    with pytest.raises(CorruptError, match=f"{key} cannot be read.*another version") as refused:
        read_log(store, RUNS["failed"])

    assert refused.value.code == "record_unreadable"


@pytest.mark.parametrize("change", [{"format": 2}, {"colour": "blue"}], ids=["format 2", "an unknown field"])
def test_f27_newer_generations_assessments_and_specs_are_refused(
    change: Mapping[str, Any], store: LocalStore
) -> None:
    """Each of them, with its key and what is not understood."""
    run_id = RUNS["succeeded"]
    generations = Generations(store, run_id, "swa")
    keys = [layout.generation(run_id, "swa", 3), layout.assessment(run_id, "swa", 3), layout.run_spec(run_id)]
    for key in keys:
        store.put(key, json.dumps(json.loads(store.get(key)) | change).encode())

    for key, read in zip(
        keys,
        [lambda: generations.fetch(3), lambda: generations.fetch_assessment(3), lambda: fetch_spec(store, run_id)],
        strict=True,
    ):
        with pytest.raises(CorruptError, match=f"{key} cannot be read"):
            read()


def test_f27_a_run_of_a_newer_version_stops_and_others_go_on(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """The averager says which record it cannot read, in its log and its note, and folds the other run."""
    newer, sound = (HandmadeRun(store, averages={"swa": "swa"}) for _ in range(2))
    for run in (newer, sound):
        run.checkpoint(10, random_weights(1))
        run.finish()
    key = layout.log_entry(newer.run_id, 2)
    store.put(key, json.dumps(json.loads(store.get(key)) | {"format": 2}).encode())

    run_until_idle(averager(store))

    assert read_log(store, sound.run_id).state == "succeeded"
    assert Generations(store, newer.run_id, "swa").newest() is None
    said = capsys.readouterr().out
    assert "run_stalled" in said
    assert f"{key} cannot be read" in said
    note = Heartbeat.model_validate_json(store.get(layout.heartbeat(newer.run_id, AVERAGER)))
    assert note.reason == "record_unreadable"
    assert f"{key} cannot be read" in note.detail
