"""Spans by OpenTelemetry over OTLP/HTTP: the only file that imports it, and only `tracing.install` loads it.

Endpoint, headers and sampling are OpenTelemetry's own variables (`OTEL_…`).
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from services.runtime.spans import Attributes

_SEND_TIMEOUT_S = 2  # a collector that is away must not keep a process from ending in time
_SEND_EVERY_MS = 2000
_NAME = "weight-averaging"
_PARENT = "traceparent"
_propagator = TraceContextTextMapPropagator()


class OtelSpan:
    """See `services.runtime.spans.Span`."""

    def __init__(self, inner: trace.Span) -> None:
        self._inner = inner

    @property
    def traceparent(self) -> str | None:
        """What work that grows from it names as its parent."""
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, context=trace.set_span_in_context(self._inner))
        return carrier.get(_PARENT)

    def note(self, attributes: Attributes) -> None:
        """Say more about it."""
        self._inner.set_attributes(dict(attributes))

    def rename(self, name: str) -> None:
        """Give it another name."""
        self._inner.update_name(name)

    def end(self, *, error: str = "") -> None:
        """It is over."""
        if error:
            self._inner.set_status(Status(StatusCode.ERROR, error))
        self._inner.end()


class OtelTracer:
    """See `services.runtime.spans.Tracer`."""

    def __init__(self, service: str) -> None:
        about = {"service.name": f"wa-{service}", "service.version": version(_NAME)}
        self._provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(timeout=_SEND_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_SEND_EVERY_MS))
        self._tracer = self._provider.get_tracer(_NAME)

    def begin(self, name: str, *, parent: str | None, attributes: Attributes) -> OtelSpan:
        """Begin a span below `parent`."""
        context = _propagator.extract({_PARENT: parent} if parent else {})
        return OtelSpan(self._tracer.start_span(name, context=context, attributes=dict(attributes)))

    def close(self) -> None:
        """Send what is waiting."""
        self._provider.shutdown()
