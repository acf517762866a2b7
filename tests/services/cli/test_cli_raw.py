"""`wa download --raw`: the raw weights of a checkpoint, as the real API serves them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from support.api import ApiRun, serving
from support.command import RUN_ID, Wa
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def run() -> ApiRun:
    """A run of two checkpoints."""
    run = ApiRun(MemoryStore()).start()
    run.checkpoint(20)
    run.checkpoint(40)
    return run


@pytest.fixture
def served(lonely_wa: Wa, run: ApiRun) -> Iterator[Wa]:
    """The command, pointed to a real API with that run."""
    with serving(run.store) as url:
        yield lonely_wa.with_variables(WA_API_URL=url)


def test_the_newest_and_any_other(served: Wa, run: ApiRun, tmp_path: Path) -> None:
    """Without --at it is the newest checkpoint; `--json` says that the weights are raw."""
    newest = served("download", run.run_id, "--raw", "-o", "raw.safetensors", "--json")
    older = served("download", run.run_id, "--raw", "--at", "20", "-o", "older.safetensors")

    found = {"average": None, "weights": "raw", "path": "raw.safetensors", "size_bytes": len(b"checkpoint 40")}
    assert (newest.returncode, json.loads(newest.stdout)) == (0, found), newest.stderr
    assert (tmp_path / "raw.safetensors").read_bytes() == b"checkpoint 40"
    assert (older.returncode, older.stdout) == (0, "older.safetensors\n")
    assert (tmp_path / "older.safetensors").read_bytes() == b"checkpoint 20"


def test_a_step_without_a_checkpoint_names_the_newest(served: Wa, run: ApiRun, tmp_path: Path) -> None:
    """Exit 1, with what there is; no file is left behind."""
    done = served("download", run.run_id, "--raw", "--at", "30", "-o", "raw.safetensors")

    assert done.returncode == 1
    assert "no checkpoint of step 30; its newest is of step 40" in done.stderr
    assert list(tmp_path.glob("raw*")) == []


@pytest.mark.parametrize(
    ("options", "place"),
    [(["--average", "swa"], "--raw"), (["--at", "best"], "--at"), (["--format", "pt"], "--format")],
)
def test_what_raw_weights_have_not_is_wrong_usage(wa: Wa, options: list[str], place: str) -> None:
    """Raw weights are in no average, are not ranked, and have one format: exit 2 with the place."""
    done = wa("download", RUN_ID, "--raw", "-o", "x", *options)

    assert done.returncode == 2
    assert f"'{place}'" in done.stderr
