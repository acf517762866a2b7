"""Which bucket a command works on that needs no API: the environment's, or that of the stack of this folder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from services.cli.connection import DEFAULT_DATA
from services.client.errors import ServiceUnreachableError
from services.runtime.settings import read_settings
from services.runtime.stores import open_store
from services.stack.state import DataFolder

if TYPE_CHECKING:
    from pathlib import Path

    from wa_core.store.base import ObjectStore


def bucket_environment(data: Path = DEFAULT_DATA) -> dict[str, str]:
    """The environment with the `WA_*` variables that name the bucket.

    Args:
        data: the data folder of an embedded stack, asked when the environment names no bucket.

    Raises:
        ServiceUnreachableError: neither names one.
    """
    if "WA_STORE_URL" in os.environ or "WA_S3_ENDPOINT" in os.environ:
        return dict(os.environ)
    found = DataFolder(data.resolve()).connection()
    if found is None:
        raise ServiceUnreachableError(
            f"which bucket? No stack runs on {data}; start one with 'wa up --detach', or set WA_STORE_URL, "
            f"WA_S3_ENDPOINT, WA_S3_ACCESS_KEY and WA_S3_SECRET_KEY"
        )
    return os.environ | {
        "WA_STORE_URL": f"s3://{found.bucket}",
        "WA_S3_ENDPOINT": found.s3_endpoint,
        "WA_S3_ACCESS_KEY": found.access_key,
        "WA_S3_SECRET_KEY": found.secret_key,
    }


def open_bucket(data: Path = DEFAULT_DATA) -> ObjectStore:
    """Open it in this process.

    Raises:
        ServiceUnreachableError: as for `bucket_environment`.
        ConfigurationError: what the environment says is wrong.
    """
    found = {name: value for name, value in bucket_environment(data).items() if value != os.environ.get(name)}
    return open_store(read_settings(**{name.removeprefix("WA_").lower(): value for name, value in found.items()}))
