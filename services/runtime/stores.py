"""Opens the bucket that the settings name: the one place where a process chooses its store adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from wa_core.errors import ConfigurationError, StoreAuthError, TransientError
from wa_core.store.probe import probe_store

if TYPE_CHECKING:
    from services.runtime.lifecycle import Stop
    from services.runtime.settings import Settings
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

_PROBE_AGAIN_S = 2.0


def prove_store(store: ObjectStore, *, stop: Stop) -> None:
    """Return once the store is known to keep its promises, or when asked to stop; waits while it is away.

    Raises:
        UnsafeStoreError: it breaks one; the message names the failed probes. Nothing may be committed to it.
    """
    while not stop.is_set:
        try:
            probe_store(store)
        except (TransientError, StoreAuthError) as error:
            log.warning("store_away", error=error.message, retry_in_s=_PROBE_AGAIN_S)
            stop.wait(_PROBE_AGAIN_S)
        else:
            return


def open_store(settings: Settings) -> ObjectStore:
    """Open ``s3://bucket`` or ``file:///folder``.

    Raises:
        ConfigurationError: the URL is of neither form.
    """
    scheme, _, rest = settings.store_url.partition("://")
    if scheme == "file" and rest.startswith("/"):
        from wa_core.store.local import LocalStore

        return LocalStore(Path(rest))
    if scheme == "s3" and rest and "/" not in rest.rstrip("/"):
        from wa_core.store.s3 import S3Store

        return S3Store(
            bucket=rest.rstrip("/"),
            endpoint_url=settings.s3_endpoint,
            public_endpoint_url=settings.s3_public_endpoint,
            access_key=settings.s3_access_key,
            secret_key=settings.s3_secret_key.get_secret_value() if settings.s3_secret_key else None,
            region=settings.s3_region,
        )
    raise ConfigurationError(f"WA_STORE_URL is {settings.store_url!r}; write s3://bucket or file:///folder")
