"""`wa verify` as a user runs it, on a real bucket."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from support.averaging import averager, run_until_idle
from support.runs import HandmadeRun, random_weights
from wa_core import layout

if TYPE_CHECKING:
    from support.command import Wa
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


@pytest.fixture
def wa(lonely_wa: Wa, seaweed: Seaweed, store: S3Store) -> Wa:
    """The command, with the bucket in its environment."""
    return lonely_wa.with_variables(
        WA_STORE_URL=f"s3://{store.bucket}",
        WA_S3_ENDPOINT=seaweed.endpoint_url,
        WA_S3_ACCESS_KEY=seaweed.access_key,
        WA_S3_SECRET_KEY=seaweed.secret_key,
    )


def test_a_sound_average_is_verified(wa: Wa, run: HandmadeRun) -> None:
    """Exit 0 and one sentence; with --json, the same for programs."""
    told = wa("verify", run.run_id, "swa")
    assert (told.returncode, told.stdout.startswith("verified: average swa")) == (0, True), told.stderr
    found = json.loads(wa("verify", run.run_id, "swa", "--json").stdout)["verified"]
    assert (found["steps"], found["is_state_equal"]) == ([10, 20, 30], True)


def test_one_changed_byte_of_one_kept_checkpoint_fails(wa: Wa, run: HandmadeRun) -> None:
    """Exit 1 and a clear sentence that names the step; no traceback."""
    key = run.log.lineage[1].files[layout.MODEL_FILE].key
    body = bytearray(run.store.get(key))
    body[-1] ^= 1
    run.store.put(key, bytes(body))
    told = wa("verify", run.run_id, "swa")
    assert told.returncode == 1
    assert "not verified: the checkpoint of step 20" in told.stderr
    assert "Traceback" not in told.stderr


def test_without_a_bucket_it_says_how_to_name_one(lonely_wa: Wa) -> None:
    """Exit 3, unlike a failed check, and what to set, where neither environment nor stack names a bucket."""
    told = lonely_wa("verify", "01M89FZRKP6SXJAMGX1DC00000", "swa")
    assert told.returncode == 3
    assert "WA_STORE_URL" in told.stderr
