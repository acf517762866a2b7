"""The runner's process: `python -m services.trainer`."""

from __future__ import annotations

import structlog

from services.runtime.lifecycle import Stop, run_ticks
from services.runtime.settings import Settings
from services.runtime.stores import open_store
from services.runtime.telemetry import configure_logging
from services.trainer.identity import new_runner_id
from services.trainer.runner import Runner, RunnerConfig
from wa_core.clock import SystemClock


def main() -> None:
    """Run until SIGTERM or SIGINT; drivers are stopped within 10 s, and their runs left to be recovered."""
    settings = Settings()
    configure_logging("runner", log_format=settings.log_format)
    stop = Stop().install()
    runner = Runner(
        open_store(settings),
        RunnerConfig(new_runner_id(), max_concurrent_runs=settings.max_concurrent_runs),
        SystemClock(),
    )
    log = structlog.get_logger(__name__)
    log.info("runner_ready", runner_id=runner.config.runner_id, store=settings.store_url)
    run_ticks(runner.tick, stop=stop, interval_s=settings.poll_interval_s)
    runner.shut_down()
    log.info("runner_stopped")


if __name__ == "__main__":
    main()
