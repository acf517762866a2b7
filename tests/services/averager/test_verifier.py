"""Verifications from request to result, with the process of `wa verify` on a real bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from services.averager.idle_worker import MAX_ATTEMPTS
from services.averager.scratch import Scratch
from services.averager.verifier import Verifier
from support.descendants import is_alive
from support.landscapes import published
from support.patience import eventually
from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.catalog.jobs import list_wanted
from wa_core.catalog.sweeper import Sweeper
from wa_core.catalog.verifications import Verifications
from wa_core.clock import SystemClock
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.runs import HandmadeRun
    from wa_core.records import VerificationResult

    Build = Callable[..., Verifier]

STEPS = (10, 20, 30)


@pytest.fixture
def run(tmp_path: Path) -> HandmadeRun:
    """A run in a folder as the bucket, with a published average."""
    return published(LocalStore(tmp_path / "bucket"), STEPS)


@pytest.fixture
def build(run: HandmadeRun, tmp_path: Path) -> Iterator[Build]:
    """Makes verifiers of the bucket; closed in the end, and nothing must be left of their work."""
    made: list[Verifier] = []
    scratch = Scratch(tmp_path / "scratch")

    def build(**options: Any) -> Verifier:
        environment = {"WA_STORE_URL": f"file://{tmp_path / 'bucket'}"}
        verifier = Verifier(run.store, clock=SystemClock(), scratch=scratch, environment=environment, **options)
        made.append(verifier)
        return verifier

    yield build
    for verifier in made:
        verifier.close()
    assert not list(scratch.folder.glob("verification-*"))
    scratch.close()


def known(run: HandmadeRun) -> Verifications:
    """What the bucket has of them."""
    return Verifications(run.store, run.run_id, "swa")


def ask(run: HandmadeRun) -> str:
    """Ask for the newest generation to be verified."""
    generation = Generations(run.store, run.run_id, "swa").numbers()[-1]
    return known(run).ask(generation, clock=SystemClock()).verification_id


def result(run: HandmadeRun, verification_id: str, verifier: Verifier) -> VerificationResult:
    """What comes of a verification, while an averager with nothing else to do works on it."""

    def worked() -> VerificationResult | None:
        verifier.work(is_idle=True)
        return None if verifier.is_busy else known(run).result(verification_id)

    found = eventually(worked, timeout_s=120.0, what="a result")
    assert found is not None
    return found


def test_what_is_right_is_equal(run: HandmadeRun, build: Build) -> None:
    """Recomputed by the real process: equal, recorded, no marker left, and no sweep takes the records away."""
    verification_id = ask(run)

    found = result(run, verification_id, build())

    assert (found.state, found.is_equal, found.code) == ("succeeded", True, None)
    assert (found.is_state_equal, found.is_served_equal, found.num_checkpoints) == (True, True, len(STEPS))
    assert found.took_s > 0
    assert list(list_wanted(run.store, "verifications")) == []
    report = Sweeper(run.store, run.run_id, clock=SystemClock()).sweep(is_dry_run=True, is_whole=True)
    ours = [key for key in report.verdicts if "/verifications/" in key]
    assert len(ours) == 4  # the request, an attempt, its progress and its result
    assert not set(ours) & set(report.doomed)


def test_64_what_differs_is_found_and_said(run: HandmadeRun, build: Build) -> None:
    """Bad input 64: served weights with one bit flipped are a finding with its code, no failure of the work."""
    record = Generations(run.store, run.run_id, "swa").newest_assessment()
    assert record is not None
    key = record.files[layout.MODEL_FILE].key
    body = bytearray(run.store.get(key))
    body[-1] ^= 1
    run.store.put(key, bytes(body))

    found = result(run, ask(run), build())

    assert (found.state, found.is_equal, found.code) == ("succeeded", False, "weights_differ")
    assert "damaged" in found.message


def test_67_what_cannot_be_recomputed_is_a_failure(run: HandmadeRun, build: Build) -> None:
    """Bad input 67: with a checkpoint gone there is no finding, and it is said which one is missing."""
    run.store.delete(run.log.lineage[0].files[layout.MODEL_FILE].key)

    found = result(run, ask(run), build())

    assert (found.state, found.is_equal, found.code) == ("failed", None, "checkpoint_missing")
    assert "step 10" in found.message


def test_a_process_that_always_dies_is_a_failure(run: HandmadeRun, build: Build) -> None:
    """After the last attempt it fails, and says how the process ended."""
    verification_id = ask(run)

    found = result(run, verification_id, build(command=("/bin/sh", "-c", "exit 7")))

    assert (found.state, found.code) == ("failed", "verification_died")
    assert "exit code 7" in found.message
    assert known(run).newest_attempt(verification_id) == MAX_ATTEMPTS


def test_f28_closing_ends_the_process_and_leaves_the_rest_to_others(
    run: HandmadeRun, build: Build, tmp_path: Path
) -> None:
    """F28: an averager that stops takes the process with it, and another one goes on at once."""
    verification_id, mark = ask(run), tmp_path / "pid"
    verifier = build(command=("/bin/sh", "-c", f"echo $$ > {mark}.part; mv {mark}.part {mark}; exec sleep 600"))
    verifier.work(is_idle=True)
    pid = int(eventually(lambda: mark.exists() and mark.read_text(), what="the process"))

    verifier.close()

    assert not is_alive(pid)
    assert result(run, verification_id, build()).is_equal


def test_a_store_that_is_away_costs_no_verdict(run: HandmadeRun, build: Build) -> None:
    """F10: a store that does not answer is no finding; the next attempt begins again."""
    verification_id = ask(run)
    away = '{"error": {"code": "store_unavailable", "message": "gone"}}'
    verifier = build(command=("/bin/sh", "-c", f"echo '{away}'; exec sleep 600"))
    verifier.work(is_idle=True)
    eventually(lambda: not verifier.is_busy, what="giving up")

    assert known(run).result(verification_id) is None
    assert result(run, verification_id, build()).is_equal
