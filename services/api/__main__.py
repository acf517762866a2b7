"""`python -m services.api`: serves the API until SIGTERM or SIGINT, then ends within 10 seconds with status 0."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING

import structlog

from services.api.access.connections import MAX_HEAD_BYTES, patient
from services.api.access.guard import GuardLimits, Hosts
from services.api.access.rates import REQUESTS, SUBMISSIONS, RateLimits
from services.api.answers.predictions import Predictor
from services.api.app import create_app
from services.api.asked.webhooks import WebhookPolicy
from services.runtime.lifecycle import Stop
from services.runtime.process import run_process
from services.runtime.serving import HttpServer
from services.runtime.stores import open_store

if TYPE_CHECKING:
    from types import FrameType

    from fastapi import FastAPI
    from pydantic import SecretStr

    from services.runtime.settings import Settings

log = structlog.get_logger(__name__)

_KEEP_ALIVE_S = 15
# How long threads that talk to the store may keep the one that answers requests from going on; 5 ms by default.
_SWITCH_S = 0.001
# When garbage is looked for; 700, 10 and 10 by default. What is kept of a thousand runs takes a fifth of a second
# to look through, in which no request is answered, and little of what a request makes is cyclic.
_GARBAGE = (10_000, 20, 100)


class ApiServer(HttpServer):
    """One that also tells waiting requests when to end, and that remembers why it gave up."""

    def __init__(self, app: FastAPI, settings: Settings, *, stop: Stop) -> None:
        super().__init__(
            app,
            host=settings.api_host,
            port=settings.api_port,
            http=patient(),
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_keep_alive=_KEEP_ALIVE_S,
        )
        self._stop = stop
        self.refusal: str | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking requests, and let those that wait for news be answered."""
        self._stop.set()
        super().handle_exit(sig, frame)

    def refuse(self, message: str) -> None:
        """End because the store cannot be trusted."""
        self.refusal = message
        self._stop.set()
        self.should_exit = True


def serve(settings: Settings) -> int:
    """Serve until told to stop; the exit status."""
    stop = Stop()
    server: ApiServer | None = None

    def on_unsafe(message: str) -> None:
        if server is not None:
            server.refuse(message)

    app = create_app(
        store=open_store(settings),
        token=_revealed(settings.token),
        write_token=_revealed(settings.write_token),
        read_token=_revealed(settings.read_token),
        named_tokens={name: token.get_secret_value() for name, token in settings.tokens.items()},
        guard=GuardLimits(hosts=Hosts(bound=settings.api_host, more=settings.allowed_hosts.split(","))),
        rates=RateLimits({REQUESTS: settings.rate_limit, SUBMISSIONS: settings.submit_limit}),
        on_unsafe=on_unsafe,
        stop=stop,
        predictor=Predictor(settings.predictor_url, token=_revealed(settings.predictor_token)),
    )
    sys.setswitchinterval(_SWITCH_S)
    app.openapi()  # works out the routes, which the first requests would have to wait for
    gc.set_threshold(*_GARBAGE)
    gc.freeze()  # what was loaded by now stays; looking for garbage in it would stop all requests for a while
    app.state.catalog.index.wake()  # the first list should not have to read every run
    app.state.max_queued_per_owner = settings.max_queued_per_owner
    app.state.webhooks = WebhookPolicy(
        is_on=settings.webhook_secret is not None, allow_private=settings.webhook_allow_private
    )
    server = ApiServer(app, settings, stop=stop)
    server.serve_until_told()
    if server.refusal is not None:
        log.error("unsafe_store", error=server.refusal)
        return 1
    return 0


def _revealed(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None


if __name__ == "__main__":
    sys.exit(run_process("api", serve))
