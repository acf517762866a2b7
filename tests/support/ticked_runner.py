"""Runners in a test's own process: ticked until something holds, and what their runs' logs say."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from services.trainer.runner import Runner
from support.training import log_of

if TYPE_CHECKING:
    from wa_core.store.base import ObjectStore

#: Of verbs for the scripted driver, and options of `RunnerConfig`.
MakeRunner = Callable[..., Runner]


def tick_until(runner: Runner, is_done: Callable[[], bool], *, limit_s: float = 120.0) -> None:
    """Tick until something holds."""
    deadline = time.monotonic() + limit_s
    while not is_done():
        assert time.monotonic() < deadline, "the runner did not come to it in time"
        runner.tick()
        time.sleep(0.02)


def kinds(store: ObjectStore, run_id: str) -> list[str]:
    """The kinds of the run's log entries."""
    return [entry.kind for entry in log_of(store, run_id).entries]
