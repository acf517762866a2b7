"""Bad checkpoints 40 to 68 in a run: `rejected` with a code in every average, and folding goes on without them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from support.averaging import WatchedStore, averager, run_until_idle, same_bits, served_weights
from support.bad_checkpoints import bad_files, good_state, misfits, wrong_records
from support.runs import HandmadeRun
from wa_core import layout
from wa_core.averaging.rules import parse_rule
from wa_core.averaging.shadow import ShadowWeights
from wa_core.catalog.averages import Generations
from wa_core.records import CheckpointCommitted, RunState
from wa_core.store.memory import MemoryStore
from wa_core.tensors import serialize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wa_core.records import FileRef, SetAside

AVERAGES = {"swa": "swa", "ema": "ema:half_life=60", "last": "window:last=3"}
FILES = bad_files()
OTHERS = misfits(200) | wrong_records(200)


def new_run() -> HandmadeRun:
    """A run that trains, with averages of each kind."""
    return HandmadeRun(MemoryStore(), averages=AVERAGES)


def check_rejected(run: HandmadeRun, codes: dict[int, str], *, folded: Sequence[int], words: str = "") -> None:
    """Let an averager finish the run: exactly these steps are rejected, and the others are folded without them."""
    run.finish()
    run_until_idle(averager(run.store))
    for name in AVERAGES:
        manifest = Generations(run.store, run.run_id, name).newest()
        assert manifest is not None
        check_said(manifest.rejected, codes, words=words)
        assert list(manifest.coefficients) == list(folded)
        assert manifest.cursor == run.log.lineage[-1].seq
    for name in ("swa", "ema"):
        shadow = ShadowWeights(parse_rule(AVERAGES[name]), dtype=torch.float64)
        for step in folded:
            shadow.fold(good_state(step), step=step)
        assert same_bits(served_weights(run.store, run.run_id, name), shadow.value())
    run.log.refresh()
    assert run.log.state is RunState.SUCCEEDED


def check_said(rejected: Sequence[SetAside], codes: dict[int, str], *, words: str) -> None:
    """Each step has its code, and one line for people."""
    assert {aside.step: aside.code for aside in rejected} == codes
    for aside in rejected:
        assert words in aside.message
        assert "\n" not in aside.message
        assert len(aside.message) < 2000


@pytest.mark.parametrize("case", FILES)
def test_40_to_58_a_file_that_is_no_checkpoint(case: str) -> None:
    """Whether it is the run's first checkpoint or a later one."""
    run, bad = new_run(), FILES[case]
    for step in (50, 100, 200, 300):
        if step in (50, 200):
            run.checkpoint_bytes(step, bad.body)
        else:
            run.checkpoint(step, good_state(step))

    check_rejected(run, {50: bad.code, 200: bad.code}, folded=[100, 300], words=bad.words)


@pytest.mark.parametrize("case", OTHERS)
def test_56_to_64_a_sound_file_that_is_not_what_it_should_be(case: str) -> None:
    """Not finite, another architecture, another size or digest than recorded: the reason is in the manifest."""
    run, bad = new_run(), OTHERS[case]
    run.checkpoint(100, good_state(100))
    run.checkpoint_bytes(200, bad.body, **bad.claims)
    run.checkpoint(300, good_state(300))

    check_rejected(run, {200: bad.code}, folded=[100, 300], words=bad.words)


@pytest.mark.parametrize("change", [{"format": 2}, {"files": {}, "shards": 3}])
def test_65_a_record_of_an_unknown_version(change: dict[str, object]) -> None:
    """The checkpoint that it is about is rejected; the log goes on, and nothing of that checkpoint is read."""
    run = new_run()
    run.checkpoint(100, good_state(100))
    entry = run.checkpoint(200, good_state(200))
    key = layout.log_entry(run.run_id, entry.seq)
    run.store.put(key, json.dumps(json.loads(run.store.get(key)) | change).encode())
    run.checkpoint(300, good_state(300))

    check_rejected(run, {200: "record_unreadable"}, folded=[100, 300], words="another version")


def test_66_a_record_that_points_out_of_its_run() -> None:
    """A sound checkpoint of another run, or a file of this one that is no checkpoint's, is never read."""
    run = new_run()
    other = HandmadeRun(run.store, averages={})
    elsewhere = other.checkpoint(200, good_state(200)).files[layout.MODEL_FILE]
    run.checkpoint(100, good_state(100))
    aside = elsewhere.model_copy(update={"key": layout.blob(run.run_id, "swa", nonce="ab", file="m.safetensors")})
    run.store.put(aside.key, run.store.get(elsewhere.key))
    for step, ref in ((200, elsewhere), (250, aside)):
        run.log.append(recorded(step, ref))
    run.checkpoint(300, good_state(300))
    run.store = watched = WatchedStore(run.store)  # type: ignore[assignment]  # it is one in all but name

    check_rejected(run, {200: "foreign_key", 250: "foreign_key"}, folded=[100, 300], words="it was not read")

    assert watched.bytes_read.keys().isdisjoint({elsewhere.key, aside.key})


def recorded(step: int, ref: FileRef) -> CheckpointCommitted:
    """A checkpoint whose weights are said to be at `ref`."""
    return CheckpointCommitted(step=step, files={layout.MODEL_FILE: ref}, spec_digest="0" * 64)


def test_67_an_absent_object() -> None:
    """A checkpoint that is committed and gone, and one that was committed without weights."""
    run = new_run()
    run.checkpoint(100, good_state(100))
    gone = run.checkpoint(200, good_state(200))
    run.store.delete(gone.files[layout.MODEL_FILE].key)
    run.log.append(CheckpointCommitted(step=250, files={}, spec_digest="0" * 64))
    run.checkpoint(300, good_state(300))

    check_rejected(run, {200: "object_missing", 250: "object_missing"}, folded=[100, 300])


def test_68_a_step_that_goes_backwards_within_an_attempt() -> None:
    """A step at or below an earlier one is rejected, with both numbers; the steps that go on are folded."""
    run = new_run()
    for step in (100, 200, 150, 200, 300):
        run.checkpoint(step, good_state(step))

    run.finish()
    run_until_idle(averager(run.store))

    for name in AVERAGES:
        manifest = Generations(run.store, run.run_id, name).newest()
        assert manifest is not None
        assert [(aside.step, aside.code) for aside in manifest.rejected] == [
            (150, "step_backwards"),
            (200, "step_backwards"),
        ]
        assert "150" in manifest.rejected[0].message
        assert list(manifest.coefficients) == [100, 200, 300]


def test_serialized_good_states_are_good() -> None:
    """What the bad ones are measured against is folded."""
    run = new_run()
    for step in (100, 200):
        run.checkpoint_bytes(step, serialize(good_state(step)))

    check_rejected(run, {}, folded=[100, 200])
