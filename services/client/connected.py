"""What both clients begin with: an address, a token, and a transport that fits how their callers wait."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

    from services.client.transport import AsyncTransport, Transport

DEFAULT_URL = "http://127.0.0.1:8000"


class Connected:
    """A connection to one service.

    Args:
        base_url: where the service is; None for ``http://127.0.0.1:8000``.
        token: the bearer token, if the service wants one.
        timeout_s: how long one answer may take to begin.
        patience_s: for how long reading is tried again while the service or its store is away.
    """

    _transport_kind: ClassVar[type[Transport | AsyncTransport]]
    _transport: Any

    def __init__(
        self,
        base_url: str | None = None,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        patience_s: float = 10.0,
    ) -> None:
        self._transport = self._transport_kind(
            base_url or DEFAULT_URL, token=token, timeout_s=timeout_s, patience_s=patience_s
        )

    @classmethod
    def from_environment(
        cls, environ: Mapping[str, str] | None = None, *, timeout_s: float = 30.0, patience_s: float = 10.0
    ) -> Self:
        """A client for ``WA_API_URL`` with ``WA_TOKEN``."""
        variables = os.environ if environ is None else environ
        return cls(
            variables.get("WA_API_URL") or None,
            token=variables.get("WA_TOKEN") or None,
            timeout_s=timeout_s,
            patience_s=patience_s,
        )

    @property
    def base_url(self) -> str:
        """Where the service is."""
        return str(self._transport.base_url)
