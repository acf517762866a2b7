"""`python -m services.averager`: the averaging worker as a process."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import structlog
import torch

from services.averager.assessor import ProcessAssessor
from services.averager.landscape_job import Limits
from services.averager.landscaper import Landscaper
from services.averager.scratch import Scratch
from services.averager.verifier import Verifier
from services.averager.worker import Averager
from services.runtime.exposition import exposed
from services.runtime.lifecycle import Stop, run_ticks
from services.runtime.metrics import MeteredStore, StoreMetrics, tell_build
from services.runtime.process import run_process
from services.runtime.stores import open_store, prove_store
from wa_core.clock import SystemClock
from wa_core.errors import ConfigurationError, StoreAuthError, TransientError

if TYPE_CHECKING:
    from services.runtime.settings import Settings

log = structlog.get_logger(__name__)

GRACE_S = 8.0


def serve(settings: Settings) -> int:
    """Fold until told to stop."""
    torch.set_num_threads(1)  # trainers on this machine come first
    stop = Stop().install()
    tell_build("averager")
    store = MeteredStore(open_store(settings), StoreMetrics())
    with ExitStack() as stack:
        scratch = stack.enter_context(_scratch(settings))
        assessor = stack.enter_context(_assessor(settings))
        idle_workers = (
            Landscaper(store, clock=SystemClock(), scratch=scratch, limits=_landscape_limits(settings)),
            Verifier(store, clock=SystemClock(), scratch=scratch, environment=_own_environment()),
        )
        for idle_worker in idle_workers:
            stack.callback(idle_worker.close)
        averager = Averager(
            store,
            clock=SystemClock(),
            assessor=assessor,
            scratch=scratch,
            should_stop=lambda: stop.is_set,
            idle_workers=idle_workers,
        )
        if settings.averager_port is not None:
            port, variable = settings.averager_port, "WA_AVERAGER_PORT"
            stack.enter_context(exposed(settings.averager_host, port, variable=variable, idle_s=averager.idle_s))
        _end_in_time(stop, assessor)
        prove_store(store, stop=stop)
        log.info("averager_ready", store=settings.store_url, scratch=str(scratch.folder))
        run_ticks(averager.tick, stop=stop, interval_s=settings.poll_interval_s)
        with suppress(TransientError, StoreAuthError):
            averager.close()
    return 0


def _end_in_time(stop: Stop, assessor: ProcessAssessor) -> None:
    """See that a stop takes effect also while a call hangs: everything is as safe as after a kill anyway."""

    def watch() -> None:
        while not stop.wait(3600.0):
            pass
        time.sleep(GRACE_S)
        log.warning("ended_in_the_middle", grace_s=GRACE_S)
        assessor.close()
        os._exit(0)

    threading.Thread(target=watch, name="end-in-time", daemon=True).start()


def _assessor(settings: Settings) -> ProcessAssessor:
    return ProcessAssessor(
        time_limit_s=settings.assess_time_limit_s,
        memory_limit_bytes=settings.assess_memory_mb << 20,
        on_ray=_on_ray(settings),
    )


def _on_ray(settings: Settings) -> list[str] | None:
    if not settings.assess_on_ray:
        return None
    if settings.ray_address is None:
        raise ConfigurationError("WA_ASSESS_ON_RAY is set, but no cluster; name one by WA_RAY_ADDRESS (host:port)")
    return [sys.executable, "-m", "services.averager.cluster", "--address", settings.ray_address]


def _landscape_limits(settings: Settings) -> Limits:
    return Limits(time_s=settings.landscape_time_limit_s, memory_bytes=settings.landscape_memory_mb << 20)


def _own_environment() -> dict[str, str]:
    """What a process needs to find this one's bucket, with its credentials."""
    return {name: value for name, value in os.environ.items() if name.startswith(("WA_", "AWS_"))}


def _scratch(settings: Settings) -> Scratch:
    try:
        return Scratch(settings.scratch_dir, memory_bytes=settings.accumulator_memory_mb << 20)
    except OSError as error:
        raise ConfigurationError(
            f"WA_SCRATCH_DIR {settings.scratch_dir} cannot be used: {error.strerror or error}; choose a folder on "
            f"a disk with room"
        ) from error


if __name__ == "__main__":
    sys.exit(run_process("averager", serve))
