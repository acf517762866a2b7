"""The runner's process: `python -m services.trainer`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import structlog

from services.runtime.lifecycle import Stop, run_ticks
from services.runtime.process import run_process
from services.runtime.stores import open_store, prove_store
from services.trainer.identity import new_runner_id
from services.trainer.runner import Runner, RunnerConfig
from wa_core.clock import SystemClock

if TYPE_CHECKING:
    from services.runtime.settings import Settings


def serve(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; drivers are stopped within 10 s, and their runs left to be recovered."""
    stop = Stop().install()
    store = open_store(settings)
    prove_store(store, stop=stop)
    runner = Runner(
        store,
        RunnerConfig(new_runner_id(), max_concurrent_runs=settings.max_concurrent_runs),
        SystemClock(),
    )
    log = structlog.get_logger(__name__)
    log.info("runner_ready", runner_id=runner.config.runner_id, store=settings.store_url)
    run_ticks(runner.tick, stop=stop, interval_s=settings.poll_interval_s)
    runner.shut_down()
    log.info("runner_stopped")
    return 0


if __name__ == "__main__":
    sys.exit(run_process("runner", serve))
