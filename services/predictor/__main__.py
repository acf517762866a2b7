"""`python -m services.predictor`: answers predictions until SIGTERM or SIGINT, then ends with status 0.

This process holds the bucket's credentials and loads no torch; the models are in processes of its own that hold no
credentials (`services.predictor.holder`), started when they are first asked.
"""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING

from services.predictor.app import Predictions, create_app
from services.predictor.engine import Limits
from services.predictor.engines import Engines
from services.predictor.published import ModelFiles, Published
from services.runtime.folder import OwnFolder
from services.runtime.metrics import MeteredStore, StoreMetrics, tell_build
from services.runtime.process import run_process
from services.runtime.serving import HttpServer
from services.runtime.stores import open_store

if TYPE_CHECKING:
    from services.runtime.settings import Settings

_MIB = 1 << 20


def serve(settings: Settings) -> int:
    """Serve until told to stop; the exit status."""
    tell_build("predictor")
    store = MeteredStore(open_store(settings), StoreMetrics())
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
            server = HttpServer(app, host=settings.predictor_host, port=settings.predictor_port)
            server.serve_until_told()
    return 0


if __name__ == "__main__":
    sys.exit(run_process("predictor", serve))
