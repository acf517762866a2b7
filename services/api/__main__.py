"""`python -m services.api`: serves the API until SIGTERM or SIGINT, then ends within 10 seconds with status 0."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import structlog
import uvicorn
from pydantic import ValidationError

from services.api.app import create_app
from services.runtime.lifecycle import Stop
from services.runtime.settings import Settings
from services.runtime.stores import open_store
from services.runtime.telemetry import configure_logging
from wa_core.errors import WeightAveragingError

if TYPE_CHECKING:
    import socket
    from types import FrameType

log = structlog.get_logger(__name__)

GRACE_S = 7  # for requests in flight, of the 10 s that a supervisor waits
_KEEP_ALIVE_S = 15


class ApiServer(uvicorn.Server):
    """uvicorn that also tells waiting requests when to end, and that remembers why it gave up."""

    def __init__(self, config: uvicorn.Config, *, stop: Stop) -> None:
        super().__init__(config)
        self._stop = stop
        self.refusal: str | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Bind, and say where."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            log.info("listening", host=host, port=port)

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
        token=settings.token.get_secret_value() if settings.token else None,
        read_token=settings.read_token.get_secret_value() if settings.read_token else None,
        on_unsafe=on_unsafe,
        stop=stop,
    )
    config = uvicorn.Config(
        app,
        host=settings.api_host,
        port=settings.api_port,
        server_header=False,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=GRACE_S,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    server = ApiServer(config, stop=stop)
    # uvicorn raises the signal once more after a clean end; by then it must do nothing, or the status is not 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: None)
    server.run()
    if server.refusal is not None:
        log.error("unsafe_store", error=server.refusal)
        return 1
    return 0


def main() -> int:
    """Read the environment and serve; the exit status."""
    try:
        settings = Settings()
    except ValidationError as error:
        sys.stderr.write(f"the environment is wrong: {error}\n")
        return 1
    configure_logging("api", log_format=settings.log_format)
    try:
        return serve(settings)
    except WeightAveragingError as error:
        log.error("cannot_start", error=error.message)  # noqa: TRY400  the message says it all
        return 1


if __name__ == "__main__":
    sys.exit(main())
