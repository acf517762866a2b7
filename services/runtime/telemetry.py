"""Structured logs on stderr: readable lines on a terminal, JSON when asked for."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import stamina
import structlog

if TYPE_CHECKING:
    from structlog.typing import Processor


def configure_logging(service: str, *, log_format: str) -> None:
    """Send every log line of this process to stderr, with its service's name."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *(_as_json() if log_format == "json" else _for_people()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    # An absent store is one line where it is handled, not one a try.
    stamina.instrumentation.set_on_retry_hooks([])


def _as_json() -> list[Processor]:
    return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]


def _for_people() -> list[Processor]:
    return [
        structlog.processors.StackInfoRenderer(),
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            # The default one prints local variables: slow, and secrets are among them.
            exception_formatter=structlog.dev.plain_traceback,
        ),
    ]
