"""Opens the bucket that the settings name: the one place where a process chooses its store adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wa_core.errors import ConfigurationError

if TYPE_CHECKING:
    from services.runtime.settings import Settings
    from wa_core.store.base import ObjectStore


def open_store(settings: Settings) -> ObjectStore:
    """Open ``s3://bucket`` or ``file:///folder``.

    Raises:
        ConfigurationError: the URL is of neither form.
    """
    scheme, _, rest = settings.store_url.partition("://")
    if scheme == "file" and rest:
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
