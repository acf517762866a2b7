"""HTTP as our processes serve it: uvicorn that says where it listens and ends on a signal with status 0.

It knows uvicorn and signals; not what is served. The invariant: once told to end it takes no new requests, and
gives those in flight `GRACE_S`, which leaves a supervisor that waits for 10 seconds nothing to kill.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import structlog
import uvicorn

if TYPE_CHECKING:
    import socket

    from starlette.applications import Starlette

log = structlog.get_logger(__name__)

GRACE_S = 7


class HttpServer(uvicorn.Server):
    """Serves one application at one address.

    Args:
        app: what answers.
        host: where to listen.
        port: 0 for a free one.
        options: more of `uvicorn.Config`.
    """

    def __init__(self, app: Starlette, *, host: str, port: int, **options: Any) -> None:  # noqa: ANN401  uvicorn's types
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            server_header=False,
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=GRACE_S,
            **options,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Bind, and say where."""
        await super().startup(sockets)
        if self.started:
            bound_host, bound_port = self.servers[0].sockets[0].getsockname()[:2]
            log.info("listening", host=bound_host, port=bound_port)

    def serve_until_told(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        # uvicorn raises the signal again after a clean end; by then it must do nothing, or the status is not 0.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: None)
        self.run()
