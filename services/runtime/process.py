"""A service's process from its environment to its exit status; no traceback reaches whoever started it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import structlog

from services.runtime import tracing
from services.runtime.redaction import secrets_in
from services.runtime.settings import read_settings
from services.runtime.telemetry import configure_logging
from wa_core.errors import ConfigurationError, WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.runtime.settings import Settings

log = structlog.get_logger(__name__)


def run_process(service: str, serve: Callable[[Settings], int]) -> int:
    """Read the environment, set up logging and serve; returns the exit status.

    Args:
        service: the name that its log lines carry.
        serve: does the work until told to stop, and returns the exit status.
    """
    try:
        settings = read_settings()
    except ConfigurationError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    configure_logging(service, log_format=settings.log_format, secrets=secrets_in(settings))
    try:
        tracing.install(service, settings)
        return serve(settings)
    except WeightAveragingError as error:
        log.error("cannot_start", error=error.message)  # noqa: TRY400  the message says it all
        return 1
    finally:
        tracing.close()
