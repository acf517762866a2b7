"""Counts and times every request, and is the last to catch what a route lets through.

Labels are route templates, never paths, so that no caller can make new time series.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.requests import ClientDisconnect

from services.api.problems import problem_response, unforeseen

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger(__name__)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class RequestMetrics:
    """The time series of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "wa_api_requests", "Requests answered.", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "wa_api_request_seconds",
            "Seconds from a request's first byte to its answer's last.",
            ["method", "route"],
            buckets=_BUCKETS_S,
            registry=self.registry,
        )


class ObservationMiddleware:
    """Wraps the application; see the module's docstring."""

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started_at = time.perf_counter()
        try:
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            pass  # nobody is left to answer
        except Exception as error:  # the outermost loop of a request: a caller gets an answer, never a traceback
            log.exception("request_failed", method=scope["method"], route=_route(scope), cut=status != 0)
            if status:
                raise ConnectionAbortedError("the answer was cut short") from error
            await problem_response(unforeseen())(scope, receive, watched)
        finally:
            self._count(scope, status=status, seconds=time.perf_counter() - started_at)

    def _count(self, scope: Scope, *, status: int, seconds: float) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.requests.labels(method, _route(scope), str(status)).inc()
        self._metrics.seconds.labels(method, _route(scope)).observe(seconds)


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", "unmatched"))
