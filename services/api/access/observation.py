"""Gives every request its id, counts, times and logs it, and is the last to catch what a route lets through.

Labels are route templates, never paths, so that no caller can make new time series. What is logged of a request
holds no query, no header and no body: secrets are in those.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from starlette.requests import ClientDisconnect
from structlog.contextvars import bound_contextvars

from services.api.access.request_id import HEADER, request_id_of
from services.api.problems import problem_response, unforeseen
from services.runtime import tracing
from services.runtime.metrics import StoreMetrics, tell_build
from wa_core import layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from services.runtime.spans import Span

log = structlog.get_logger(__name__)

#: Where a request's state has the bytes that went past this program (`services.api.access.connections`).
RELAYED_BYTES = "relayed_bytes"

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_EVENT_STREAM = b"text/event-stream"
_PROBES = frozenset({"/livez", "/readyz", "/metrics"})  # every few seconds; a line each only when they fail
_RUN = re.compile(r"/v1/runs/([^/:]{26})")
_FAULT, _BROKEN = 400, 500


class RequestMetrics:
    """The time series of one application."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        tell_build("api", registry=registry)
        self.store = StoreMetrics(registry=registry)
        self.requests = Counter(
            "wa_api_requests", "Requests answered.", ["method", "route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "wa_api_request_seconds",
            "Seconds from a request's first byte to its answer's last; event streams are not among them.",
            ["method", "route"],
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self.in_flight = Gauge("wa_api_requests_in_flight", "Requests being answered now.", registry=registry)
        self.streams = Gauge("wa_api_event_streams", "Clients that are sent events now (SSE).", registry=registry)
        self.sent_bytes = Counter("wa_api_sent_bytes", "Bytes of answers' bodies.", registry=registry)


@dataclass(slots=True)
class _Answer:
    """What has been sent of an answer; status 0 while nothing was."""

    span: Span
    status: int = 0
    num_bytes: int = 0
    is_stream: bool = False


class ObservationMiddleware:
    """Wraps the application, outside of everything else; see the module's docstring."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope["headers"])
        ids = {"request_id": request_id, **_run_of(scope)}
        answer = _Answer(_begin_span(scope, ids))
        scope.setdefault("state", {})["traceparent"] = answer.span.traceparent
        with bound_contextvars(**ids), self._metrics.in_flight.track_inprogress():
            await self._observed(scope, receive, send, answer=answer, request_id=request_id)

    async def _observed(
        self, scope: Scope, receive: Receive, send: Send, *, answer: _Answer, request_id: str
    ) -> None:
        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (HEADER, request_id.encode())]
                self._begin(answer, message)
            elif message["type"] == "http.response.body":
                answer.num_bytes += len(message.get("body", b""))
            await send(message)

        started_at = time.perf_counter()
        try:
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            pass  # nobody is left to answer
        except Exception as error:  # the outermost loop of a request: a caller gets an answer, never a traceback
            log.exception("request_failed", method=scope["method"], route=_route(scope), cut=answer.status != 0)
            if answer.status:
                raise ConnectionAbortedError("the answer was cut short") from error
            await problem_response(unforeseen())(scope, receive, watched)
        finally:
            self._end(scope, answer, seconds=time.perf_counter() - started_at)

    def _begin(self, answer: _Answer, message: Message) -> None:
        answer.status = message["status"]
        answer.is_stream = any(
            name == b"content-type" and value.startswith(_EVENT_STREAM) for name, value in message["headers"]
        )
        if answer.is_stream:
            self._metrics.streams.inc()

    def _end(self, scope: Scope, answer: _Answer, *, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = _route(scope)
        answer.num_bytes += scope["state"].get(RELAYED_BYTES, 0)
        self._metrics.requests.labels(method, route, str(answer.status)).inc()
        self._metrics.sent_bytes.inc(answer.num_bytes)
        answer.span.rename(f"{method} {route}")
        answer.span.note({"http.route": route, "http.response.status_code": answer.status})
        answer.span.end(error=str(answer.status) if answer.status >= _BROKEN else "")
        if answer.is_stream:
            self._metrics.streams.dec()
        else:
            self._metrics.seconds.labels(method, route).observe(seconds)
        if route not in _PROBES or answer.status >= _FAULT:
            log.info(
                "request",
                method=method,
                route=route,
                status=answer.status,
                seconds=round(seconds, 6),
                sent_bytes=answer.num_bytes,
            )


def traceparent_of(request: Request) -> str | None:
    """The span of a request, for what is begun by it; None outside of the middleware, and without any trace."""
    found: str | None = getattr(request.state, "traceparent", None)
    return found


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", "unmatched"))


def _begin_span(scope: Scope, ids: Mapping[str, str]) -> Span:
    """A span below the caller's, if it sent one; none for probes."""
    if scope["path"] in _PROBES:
        return tracing.NO_SPAN
    sent = [value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"]
    parent = tracing.parse_traceparent(sent[0]) if len(sent) == 1 else None
    attributes = {"http.request.method": scope["method"]} | {f"wa.{name}": value for name, value in ids.items()}
    return tracing.begin(scope["method"], parent=parent, attributes=attributes)


def _run_of(scope: Scope) -> dict[str, str]:
    """The run that a request is about, if it is about one."""
    found = _RUN.match(scope["path"])
    return {"run_id": found[1]} if found and layout.is_run_id(found[1]) else {}
