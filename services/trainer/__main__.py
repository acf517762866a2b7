"""The runner's process: `python -m services.trainer`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import structlog

from services.runtime.exposition import exposed
from services.runtime.folder import OwnFolder
from services.runtime.lifecycle import Stop, run_ticks
from services.runtime.metrics import MeteredStore, StoreMetrics, tell_build
from services.runtime.process import run_process
from services.runtime.stores import open_store, prove_store
from services.trainer.cluster import open_cluster
from services.trainer.identity import new_runner_id
from services.trainer.runner import Runner, RunnerConfig
from wa_core.clock import SystemClock

if TYPE_CHECKING:
    from pathlib import Path

    from services.runtime.settings import Settings
    from services.trainer.cluster import Cluster
    from wa_core.store.base import ObjectStore


def serve(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; drivers are stopped within 10 s, and their runs left to be recovered."""
    stop = Stop().install()
    tell_build("runner")
    store = MeteredStore(open_store(settings), StoreMetrics())
    prove_store(store, stop=stop)
    log = structlog.get_logger(__name__)
    with ExitStack() as stack:
        folder = OwnFolder("wa-runner-")
        stack.callback(folder.close)
        cluster = open_cluster(settings)
        stack.callback(cluster.close)
        runner = _runner(store, settings, cluster, folder=folder.path)
        if settings.runner_port is not None:
            port, variable = settings.runner_port, "WA_RUNNER_PORT"
            stack.enter_context(exposed(settings.runner_host, port, variable=variable, idle_s=runner.idle_s))
        log.info("runner_ready", runner_id=runner.config.runner_id, store=settings.store_url)
        run_ticks(runner.tick, stop=stop, interval_s=settings.poll_interval_s)
        runner.shut_down()
    log.info("runner_stopped")
    return 0


def _runner(store: ObjectStore, settings: Settings, cluster: Cluster, *, folder: Path) -> Runner:
    config = RunnerConfig(
        new_runner_id(),
        max_concurrent_runs=settings.max_concurrent_runs,
        max_runs_per_owner=settings.max_runs_per_owner,
        folder=folder,
    )
    return Runner(store, config, SystemClock(), totals=cluster.totals)


if __name__ == "__main__":
    sys.exit(run_process("runner", serve))
