"""Where the service is: as options and the environment say, or else the embedded stack of `./.wa`.

The client and the stack are loaded when a service is looked for: commands on files do not wait for them.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from wa_core.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from services.client import Client

DEFAULT_DATA = Path(".wa")


@contextlib.contextmanager
def connect(api_url: str | None, token: str | None, *, patience_s: float = 0.0) -> Iterator[Client]:
    """A client for the service that is meant. A refusal on the way out gets a suggestion, where there is one.

    Args:
        api_url: its address if the user gave one.
        token: its token if the user gave one.
        patience_s: for how long reading is tried again while the service is away.

    Raises:
        ServiceUnreachableError: a patient client is asked for, and nobody is there to begin with: a service that
            restarts is waited for, a wrong address is not.
    """
    from services.cli.suggestions import suggest_name
    from services.client import ApiError, Client

    api_url, token = service_of(api_url, token)
    if patience_s:
        with Client(api_url, token=token, patience_s=0.0) as first, contextlib.suppress(ApiError):
            first.version()
    with Client(api_url, token=token, patience_s=patience_s) as client:
        try:
            yield client
        except ApiError as error:
            error.hint = suggest_name(client, error) or error.hint
            raise


def service_of(api_url: str | None, token: str | None) -> tuple[str | None, str | None]:
    """Address and token of the service that is meant: those given, or else those of the stack of this folder."""
    if api_url is None and (found := _embedded()) is not None:
        api_url, token = found[0], token or found[1]
    return api_url, token or None


def _embedded() -> tuple[str, str] | None:
    from services.stack.state import DataFolder

    try:
        stack = DataFolder(DEFAULT_DATA.resolve()).connection()
    except (ConfigurationError, OSError):
        return None  # an unreadable folder here, or one that is gone, says nothing about the service
    return (stack.api_url, stack.token) if stack else None
