"""`python -m services.predictor`: answers predictions until SIGTERM or SIGINT, then ends with status 0.

This process holds the bucket's credentials and loads no torch; the models are in processes of its own that hold no
credentials (`services.predictor.holder`), started when they are first asked.
"""

from __future__ import annotations

import signal
import sys
from contextlib import closing
from typing import TYPE_CHECKING

import structlog
import uvicorn

from services.predictor.app import Predictions, create_app
from services.predictor.engine import Limits
from services.predictor.engines import Engines
from services.predictor.published import ModelFiles, Published
from services.runtime.folder import OwnFolder
from services.runtime.process import run_process
from services.runtime.stores import open_store

if TYPE_CHECKING:
    import socket

    from services.runtime.settings import Settings

log = structlog.get_logger(__name__)

GRACE_S = 7  # for requests in flight, of the 10 s that a supervisor waits
_MIB = 1 << 20


class PredictorServer(uvicorn.Server):
    """uvicorn that says where it listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Bind, and say where."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            log.info("listening", host=host, port=port)


def serve(settings: Settings) -> int:
    """Serve until told to stop; the exit status."""
    store = open_store(settings)
    limits = Limits(
        models_bytes=settings.predictor_models_mb * _MIB,
        memory_bytes=settings.predictor_memory_mb * _MIB,
        time_s=settings.predictor_time_limit_s,
    )
    with closing(OwnFolder("wa-predictor-", parent=settings.scratch_dir)) as own:
        files = ModelFiles(store, own.path, max_bytes=limits.models_bytes)
        with closing(Engines(store, files, folder=own.path, limits=limits)) as engines:
            token = settings.predictor_token.get_secret_value() if settings.predictor_token else None
            app = create_app(Predictions(Published(store), files, engines, token=token))
            server = PredictorServer(_uvicorn_config(app, settings))
            # uvicorn raises the signal once more after a clean end; by then it must do nothing.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda _number, _frame: None)
            server.run()
    return 0


def _uvicorn_config(app: object, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        host=settings.predictor_host,
        port=settings.predictor_port,
        server_header=False,
        access_log=False,
        log_config=None,
        timeout_graceful_shutdown=GRACE_S,
    )


if __name__ == "__main__":
    sys.exit(run_process("predictor", serve))
