"""`python -m services.averager`: the averaging worker as a process."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import structlog
import torch

from services.averager.assessor import ProcessAssessor
from services.averager.worker import Averager
from services.runtime.lifecycle import Stop, run_ticks
from services.runtime.process import run_process
from services.runtime.stores import open_store
from wa_core.clock import SystemClock

if TYPE_CHECKING:
    from services.runtime.settings import Settings


def serve(settings: Settings) -> int:
    """Fold until told to stop."""
    torch.set_num_threads(1)  # trainers on this machine come first
    stop = Stop().install()
    with ProcessAssessor() as assessor:
        averager = Averager(open_store(settings), clock=SystemClock(), assessor=assessor)
        structlog.get_logger(__name__).info("averager_ready", store=settings.store_url)
        run_ticks(averager.tick, stop=stop, interval_s=settings.poll_interval_s)
    return 0


if __name__ == "__main__":
    sys.exit(run_process("averager", serve))
