"""Puts the API together: routes, the token, problems, metrics and the store. Loads neither torch nor ray."""

from __future__ import annotations

import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import structlog
from anyio import CapacityLimiter
from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute

from services.api import problems
from services.api.access.auth import Tokens, require_token
from services.api.access.guard import Guard, GuardLimits
from services.api.access.headers import SecurityHeaders
from services.api.access.observation import ObservationMiddleware, RequestMetrics
from services.api.access.rates import RateLimits
from services.api.access.token_book import TokenBook
from services.api.answers.history import History
from services.api.answers.predictions import Predictor
from services.api.answers.weights import MAX_DOWNLOADS
from services.api.asked.body import AverageAddition, PredictionRequest, WantedRule
from services.api.asked.webhooks import WebhookPolicy
from services.api.dashboard import routes as pages
from services.api.dashboard.static_files import PageFiles
from services.api.description import complete
from services.api.routes import (
    averages,
    checkpoints,
    deliveries,
    feeds,
    formats,
    insight,
    landscapes,
    packages,
    predictions,
    runs,
    service,
    session,
    tokens,
    verifications,
)
from services.api.schemas import Problem
from services.api.state.catalog import Catalog
from services.api.state.patience import BriefStore
from services.api.state.readiness import Readiness
from services.api.state.watching import Watches
from services.runtime.lifecycle import Stop
from services.runtime.metrics import MeteredStore
from wa_core.clock import SystemClock
from wa_core.records import LandscapeRequest, Resumption, RunRequest, TokenRequest
from wa_core.store.base import ReachableStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

_ROUTERS = (
    service.router,
    runs.router,
    checkpoints.router,
    packages.router,
    feeds.router,
    deliveries.router,
    averages.router,
    insight.router,
    landscapes.router,
    verifications.router,
    pages.router,
    tokens.router,
    session.router,
    predictions.router,
    formats.router,
)
_DESCRIPTION = (
    "Submit training runs, watch them, and download weights that were averaged outside the training job. "
    "Errors are problem documents (RFC 9457) with a stable `code`."
)


class Api(FastAPI):
    """The application, whose description also holds the models that routes name without using them."""

    _describing = threading.Lock()

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI description."""
        with self._describing:
            return self.openapi_schema or self._describe()

    def _describe(self) -> dict[str, Any]:
        schema = super().openapi()
        known = schema["components"]["schemas"]
        for model in (
            Problem,
            RunRequest,
            Resumption,
            AverageAddition,
            PredictionRequest,
            WantedRule,
            LandscapeRequest,
            TokenRequest,
        ):
            definition = model.model_json_schema(ref_template="#/components/schemas/{model}")
            known.update(definition.pop("$defs", {}))
            known.setdefault(model.__name__, definition)
        return complete(schema, is_open=self.state.tokens.is_open)


def create_app(  # noqa: PLR0913  one parameter for each thing that it is put together from
    *,
    store: ObjectStore,
    token: str | None = None,
    write_token: str | None = None,
    read_token: str | None = None,
    named_tokens: Mapping[str, str] | None = None,
    guard: GuardLimits | None = None,
    rates: RateLimits | None = None,
    clock: Clock | None = None,
    on_unsafe: Callable[[str], None] | None = None,
    stop: Stop | None = None,
    predictor: Predictor | None = None,
    webhooks: WebhookPolicy | None = None,
    max_queued_per_owner: int | None = None,
) -> FastAPI:
    """The API over one bucket.

    Args:
        store: the bucket.
        token: what callers must send; None lets everybody in, unless there is another token.
        write_token: what callers may send instead who submit and cancel runs, but send no code.
        read_token: what callers may send instead who only read.
        named_tokens: owner -> what callers may send instead whose runs are that owner's.
        guard: what one request may take.
        rates: how often each caller may ask; without it, as often as it likes.
        clock: the time; the machine's by default.
        on_unsafe: told when the store turns out not to honour create-once; it should end the process.
        stop: once set, waiting requests are answered, so that the process can end.
        predictor: the way to what answers predictions; none by default.
        webhooks: which may be asked for; none by default.
        max_queued_per_owner: how many runs of one owner may wait; None for as many as they like.
    """
    app = _application()
    metrics = RequestMetrics()
    brief = BriefStore(MeteredStore(store, metrics.store))
    app.state.tokens = Tokens(full=token, write=write_token, read=read_token, named=named_tokens or {})
    app.state.clock = clock or SystemClock()
    app.state.token_book = TokenBook(brief, clock=app.state.clock)
    app.state.rates = rates or RateLimits({})
    app.state.stop = stop or Stop()
    app.state.webhooks = webhooks or WebhookPolicy()
    app.state.max_queued_per_owner = max_queued_per_owner
    app.state.reachable_store = store if isinstance(store, ReachableStore) else None
    app.state.catalog = Catalog(brief, clock=app.state.clock)
    app.state.history = History(app.state.catalog)
    app.state.watches = Watches()
    app.state.download_threads = CapacityLimiter(MAX_DOWNLOADS)
    app.state.readiness = Readiness(store, brief, on_unsafe=on_unsafe or _log_unsafe)
    app.state.predictor = predictor or Predictor(None)
    app.state.metrics = metrics
    app.state.methods_at = methods_at
    _install(app, metrics, guard=guard or GuardLimits())
    return app


def _application() -> Api:
    return Api(
        title="weight-averaging",
        version=service.VERSION,
        description=_DESCRIPTION,
        dependencies=[Depends(require_token)],
        lifespan=_lifespan,
        generate_unique_id_function=lambda route: route.name,
        openapi_url=None,  # it is a route of ours, behind the token as all others
        docs_url=None,  # these pages load their scripts from elsewhere
        redoc_url=None,
    )


def _install(app: FastAPI, metrics: RequestMetrics, *, guard: GuardLimits) -> None:
    """Routes, problems, and what every request goes through."""
    for router in _ROUTERS:
        app.include_router(router)
    app.mount("/static", PageFiles(), name="static")
    problems.install(app)
    app.add_middleware(Guard, limits=guard)
    app.add_middleware(ObservationMiddleware, metrics=metrics)
    app.add_middleware(SecurityHeaders)  # the outermost, so that no answer is without


def methods_at(path: str) -> list[str]:
    """The methods that any route takes at `path`, for `Allow`; files are there to be read."""
    routes = (route for router in _ROUTERS for route in router.routes if isinstance(route, APIRoute))
    found = [route for route in routes if route.path_regex.match(path)]
    # A run's id has no colon, so `:cancel` is no part of one.
    named = [route for route in found if ":" in route.path]
    methods = {method for route in named or found for method in route.methods or ()}
    return sorted(methods or {"GET", "HEAD"})


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.readiness.start()
    yield
    app.state.readiness.stop()
    app.state.catalog.close()
    await app.state.predictor.close()


def _log_unsafe(message: str) -> None:
    log.error("unsafe_store", error=message)
