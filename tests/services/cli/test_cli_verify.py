"""`wa verify` as a user runs it, on a real bucket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from support.averaging import averager, run_until_idle
from support.runs import HandmadeRun, random_weights
from wa_core import layout

if TYPE_CHECKING:
    from pathlib import Path

    from support.seaweed import Seaweed
    from wa_core.store.s3 import S3Store


@pytest.fixture
def store(seaweed: Seaweed) -> S3Store:
    """A fresh bucket."""
    return seaweed.new_store()


@pytest.fixture
def run(store: S3Store) -> HandmadeRun:
    """A run that has succeeded."""
    run = HandmadeRun(store, averages={"swa": "swa"})
    for step in (10, 20, 30):
        run.checkpoint(step, random_weights(step))
    run.finish()
    run_until_idle(averager(store))
    run.log.refresh()
    return run


def wa(seaweed: Seaweed, run: HandmadeRun, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`wa verify`, with the bucket in the environment."""
    store: S3Store = run.store  # type: ignore[assignment]
    environment = os.environ | {
        "WA_STORE_URL": f"s3://{store.bucket}",
        "WA_S3_ENDPOINT": seaweed.endpoint_url,
        "WA_S3_ACCESS_KEY": seaweed.access_key,
        "WA_S3_SECRET_KEY": seaweed.secret_key,
    }
    argv = [sys.executable, "-m", "services.cli", "verify", run.run_id, *arguments]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_sound_average_is_verified(seaweed: Seaweed, run: HandmadeRun) -> None:
    """Exit 0 and one sentence; with --json, the same for programs."""
    told = wa(seaweed, run, "swa")
    assert (told.returncode, told.stdout.startswith("verified: average swa")) == (0, True), told.stderr
    found = json.loads(wa(seaweed, run, "swa", "--json").stdout)["verified"]
    assert (found["steps"], found["is_state_equal"]) == ([10, 20, 30], True)


def test_one_changed_byte_of_one_kept_checkpoint_fails(seaweed: Seaweed, run: HandmadeRun) -> None:
    """Exit 1 and a clear sentence that names the step; no traceback."""
    key = run.log.lineage[1].files[layout.MODEL_FILE].key
    body = bytearray(run.store.get(key))
    body[-1] ^= 1
    run.store.put(key, bytes(body))
    told = wa(seaweed, run, "swa")
    assert told.returncode == 1
    assert "not verified: the checkpoint of step 20" in told.stderr
    assert "Traceback" not in told.stderr


def test_without_a_bucket_it_says_how_to_name_one(tmp_path: Path) -> None:
    """Exit 1 and what to set, where neither the environment nor a stack of the folder names a bucket."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WA_")}
    argv = [sys.executable, "-m", "services.cli", "verify", "01M89FZRKP6SXJAMGX1DC00000", "swa"]
    told = subprocess.run(
        argv, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert told.returncode == 1
    assert "WA_STORE_URL" in told.stderr
