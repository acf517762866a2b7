"""`python -m services.notifier`: tells webhooks what happens to runs, until SIGTERM or SIGINT."""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import structlog

from services.notifier.sender import Sender
from services.notifier.signature import parse_secret
from services.notifier.worker import Notifier
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


def serve(settings: Settings) -> int:
    """Tell until told to stop."""
    if settings.webhook_secret is None:
        raise ConfigurationError("WA_WEBHOOK_SECRET is not set, and messages are sent signed or not at all")
    key = parse_secret(settings.webhook_secret.get_secret_value())
    stop = Stop().install()
    tell_build("notifier")
    store = MeteredStore(open_store(settings), StoreMetrics())
    sender = Sender(allow_private=settings.webhook_allow_private)
    url = settings.public_url or ""
    notifier = Notifier(store, post=sender.post, key=key, clock=SystemClock(), public_url=url)
    with ExitStack() as stack:
        if settings.notifier_port is not None:
            port, variable = settings.notifier_port, "WA_NOTIFIER_PORT"
            stack.enter_context(exposed(settings.notifier_host, port, variable=variable, idle_s=notifier.idle_s))
        prove_store(store, stop=stop)
        log.info("notifier_ready", store=settings.store_url)
        run_ticks(notifier.tick, stop=stop, interval_s=settings.poll_interval_s)
        with suppress(TransientError, StoreAuthError):
            notifier.close()
    return 0


if __name__ == "__main__":
    sys.exit(run_process("notifier", serve))
