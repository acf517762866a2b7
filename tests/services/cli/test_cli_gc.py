"""`wa gc` on a real bucket on disk."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING

import pytest

from services.cli.main import main
from support.histories import MiniatureAverager, MiniatureRun, exists
from wa_core import layout
from wa_core.records import CheckpointPolicy
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MiniatureRun:
    """A run of six checkpoints that has ended; two of them are to stay."""
    monkeypatch.setenv("WA_STORE_URL", f"file://{tmp_path}/bucket")
    store = LocalStore(tmp_path / "bucket")
    run = MiniatureRun(store, averages={"swa": "swa"}, policy=CheckpointPolicy(keep_last=2))
    averager = MiniatureAverager(run, "swa")
    for step in range(10, 70, 10):
        run.checkpoint(step)
        averager.catch_up()
    run.succeed()
    return run


def test_gc_deletes_what_the_policy_lets_go(run: MiniatureRun, capsys: pytest.CaptureFixture[str]) -> None:
    """Of six checkpoints the last two are left; each object that is kept or goes is listed with its reason."""
    assert main(["gc", run.run_id]) == 0

    said = capsys.readouterr().out
    assert [run.has(entry) for entry in run.log.lineage] == [False] * 4 + [True] * 2
    assert "one of the last 2" in said
    assert "every average has passed it" in said
    assert "never deleted" in said


def test_gc_dry_run_deletes_nothing(run: MiniatureRun, capsys: pytest.CaptureFixture[str]) -> None:
    """--dry-run gives the same verdicts as JSON, record by record, and every object is still there."""
    assert main(["gc", run.run_id, "--dry-run", "--json"]) == 0

    told = json.loads(capsys.readouterr().out)
    (report,) = told["runs"]
    verdicts = {each["key"]: each for each in report["objects"]}
    assert all(run.has(entry) for entry in run.log.lineage)
    assert report["freed_bytes"] == 0
    assert verdicts[layout.log_entry(run.run_id, 1)]["verdict"] == "keep"
    first = verdicts[run.log.lineage[0].files[layout.MODEL_FILE].key]
    assert (first["verdict"], first["is_deleted"]) == ("delete", False)
    assert all(each["reason"] for each in verdicts.values())


def test_gc_takes_orphans_of_every_run_after_their_grace(
    run: MiniatureRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without RUN all runs are swept: a file that no record names goes once it is a day old, and not before."""
    old, young = (layout.blob(run.run_id, "swa", nonce=nonce, file=layout.SHADOW_FILE) for nonce in ("aa", "bb"))
    for key in (old, young):
        run.store.put(key, b"lost")
    yesterday = time.time() - 25 * 3600
    os.utime(tmp_path / "bucket" / old, (yesterday, yesterday))

    assert main(["gc"]) == 0

    assert not exists(run.store, old)
    assert exists(run.store, young)
    assert "one may be on its way" in capsys.readouterr().out


def test_gc_of_an_unknown_run_says_so(run: MiniatureRun, capsys: pytest.CaptureFixture[str]) -> None:
    """An id without a run is exit 1 and one line."""
    assert main(["gc", layout.new_run_id(run.clock.now())]) == 1
    assert "there is no run" in capsys.readouterr().err


def test_gc_without_a_bucket_says_how_to_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With neither WA_* nor a stack in this folder, it says what to set."""
    for name in ("WA_STORE_URL", "WA_S3_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    assert main(["gc"]) == 3
    assert "WA_STORE_URL" in capsys.readouterr().err
