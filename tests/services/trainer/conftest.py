"""Runners over a bucket in a folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from services.trainer.runner import Runner, RunnerConfig
from support import scripted_driver
from wa_core.clock import Clock, SystemClock
from wa_core.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.ticked_runner import MakeRunner


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """A bucket in a folder, so that driver processes see it as well."""
    return LocalStore(tmp_path / "bucket")


@pytest.fixture
def make_runner(store: LocalStore, tmp_path: Path) -> Iterator[MakeRunner]:
    """Builds runners whose drivers follow a script; stops them all in the end."""
    runners: list[Runner] = []

    def make(verbs: str, *, num_cpus: int | None = 8, clock: Clock | None = None, **options: object) -> Runner:
        driver = (sys.executable, str(Path(scripted_driver.__file__)), str(tmp_path / "bucket"), verbs)
        config = RunnerConfig(
            f"elsewhere/{len(runners)}/1/x", driver=driver, folder=tmp_path, look_around_interval_s=0.0
        )
        totals = {"CPU": float(num_cpus)} if num_cpus is not None else None
        runners.append(Runner(store, replace(config, **options), clock or SystemClock(), totals=lambda: totals))
        return runners[-1]

    yield make
    for runner in runners:
        runner.shut_down()
