"""Spans of work, joined across processes by the W3C `traceparent` that a run's records carry (ADR 23).

Without tracing it does nothing but hand `traceparent` on, and no tracing library is loaded. A process has one
tracer, set by `install`, as it has one log.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wa_core.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.runtime.settings import Settings
    from services.runtime.spans import Attributes, Span, Tracer

#: What a process that runs user code may know of how traces are sent: no headers, which hold credentials.
SHARED_VARIABLES = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_TRACES_SAMPLER",
    "OTEL_TRACES_SAMPLER_ARG",
)
_SWITCHES = SHARED_VARIABLES[:2]
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


class _NoSpan:
    def __init__(self, traceparent: str | None) -> None:
        self.traceparent = traceparent

    def note(self, attributes: Attributes) -> None:
        pass

    def rename(self, name: str) -> None:
        pass

    def end(self, *, error: str = "") -> None:
        pass


class NoTracer:
    """Records nothing, and hands the parent on."""

    def begin(self, name: str, *, parent: str | None, attributes: Attributes) -> Span:  # noqa: ARG002  the port's
        """A span that is nowhere."""
        return _NoSpan(parent)

    def close(self) -> None:
        """Nothing waits."""


#: For work that is not traced whatever the settings say.
NO_SPAN: Span = _NoSpan(None)

_tracer: Tracer = NoTracer()


def install(service: str, settings: Settings) -> None:
    """Trace this process, if the environment says where to.

    Raises:
        ConfigurationError: tracing is wanted, and its libraries are not installed.
    """
    global _tracer  # noqa: PLW0603  one of a process, as its log is
    is_wanted = settings.tracing
    if is_wanted is None:
        is_wanted = any(os.environ.get(name) for name in _SWITCHES)
    if not is_wanted:
        return
    try:
        from services.runtime.otel import OtelTracer
    except ImportError as error:
        raise ConfigurationError(
            f"tracing is asked for (WA_TRACING or {_SWITCHES[0]}), but {error.name} is not installed; "
            f"install weight-averaging[tracing]"
        ) from None
    _tracer = OtelTracer(service)


def is_on() -> bool:
    """Whether spans go anywhere."""
    return not isinstance(_tracer, NoTracer)


def begin(name: str, *, parent: str | None, attributes: Attributes | None = None) -> Span:
    """Begin a span; whoever begins it ends it."""
    return _tracer.begin(name, parent=parent, attributes=attributes or {})


@contextmanager
def span(name: str, *, parent: str | None, attributes: Attributes | None = None) -> Iterator[Span]:
    """A span for as long as the block takes; an exception is its error."""
    begun = begin(name, parent=parent, attributes=attributes)
    try:
        yield begun
    except BaseException as error:
        begun.end(error=type(error).__name__)
        raise
    begun.end()


def close() -> None:
    """Send what is waiting, at the end of the process."""
    _tracer.close()


def parse_traceparent(text: str | None) -> str | None:
    """The `traceparent` that a caller sent, if it is one."""
    return text if text is not None and _TRACEPARENT.fullmatch(text) else None
