"""Structured logs on stderr: readable lines on a terminal, one JSON object a line when asked for.

Every line says its service, and what else its process is about; a request or a run that is being worked on adds
its ids with `structlog.contextvars.bound_contextvars`. What libraries warn of leaves in the same form.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import stamina
import structlog

from services.runtime.redaction import redacting

if TYPE_CHECKING:
    from collections.abc import Iterable

    from structlog.typing import EventDict, Processor, WrappedLogger


def configure_logging(service: str, *, log_format: str, secrets: Iterable[str] = (), **about: object) -> None:
    """Send every log line of this process to stderr, with its service's name.

    Args:
        service: the name.
        log_format: ``json`` or ``console``.
        secrets: what no line may hold.
        about: what the whole process is about, such as its `run_id` and `attempt`. These are no context variables,
            which a new thread would not have.
    """
    said_by_all = {"service": service, **about}

    def add_process(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {**said_by_all, **event}

    common: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        add_process,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering = [*(_as_json() if log_format == "json" else _for_people()), redacting(secrets)]
    structlog.configure(
        processors=[*common, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=_Stderr()),  # type: ignore[arg-type]  # all that it uses
        cache_logger_on_first_use=True,
    )
    _configure_libraries(common, rendering)
    # An absent store is one line where it is handled, not one a try.
    stamina.instrumentation.set_on_retry_hooks([])


class _Stderr:
    """Whatever `sys.stderr` is when a line is written: the trainer passes its own on to the bucket for a while."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _configure_libraries(common: list[Processor], rendering: list[Processor]) -> None:
    handler = logging.StreamHandler(_Stderr())
    strip = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*common, structlog.stdlib.add_logger_name], processors=[strip, *rendering]
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


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
