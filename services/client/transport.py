"""The half of an HTTP exchange that waits, once for threads and once for tasks.

Only requests without effects are tried again, and those that an Idempotency-Key lets happen once.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2

from services.client.exchange import (
    RANGE_NOT_SATISFIABLE,
    client_settings,
    problem,
    request_settings,
    result_of,
    unreachable_named,
)
from services.client.retries import TROUBLE, Patience

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from services.client.calls import Call

T = TypeVar("T")


class Transport:
    """Calls to one service that the calling thread waits for.

    Args:
        base_url: such as ``http://127.0.0.1:8000``.
        token: the bearer token, if the service wants one.
        timeout_s: how long one answer may take to begin.
        patience_s: for how long a request that may be is tried again while the service or its store is away.
    """

    def __init__(self, base_url: str, *, token: str | None, timeout_s: float, patience_s: float) -> None:
        self._http = httpx2.Client(**client_settings(base_url, token=token, timeout_s=timeout_s))
        self.base_url = base_url.rstrip("/")
        self.patience_s = patience_s
        self._timeout_s = timeout_s

    def close(self) -> None:
        """Give back the connections."""
        self._http.close()

    def send(self, call: Call[T]) -> T:
        """Send a call, again where that is safe, and return its result."""
        patience = Patience(self.patience_s if call.is_repeatable else 0.0)
        while True:
            try:
                with unreachable_named(self.base_url):
                    response = self._http.request(**request_settings(call, timeout_s=self._timeout_s))
                return result_of(call, response, base_url=self.base_url)
            except TROUBLE as error:
                wait_s = patience.wait_s_after(error)
            time.sleep(wait_s)

    @contextmanager
    def stream(self, call: Call[Any]) -> Iterator[httpx2.Response]:
        """An answer whose body comes in pieces, from wherever the service sends the caller to.

        416 is the caller's to handle, other problems are raised. The token stays with the service.
        """
        request = self._http.build_request(**request_settings(call, timeout_s=self._timeout_s))
        with unreachable_named(self.base_url):
            response = self._http.send(request, stream=True, follow_redirects=True)
            try:
                if response.is_error and response.status_code != RANGE_NOT_SATISFIABLE:
                    response.read()
                    raise problem(response)
                yield response
            finally:
                response.close()


class AsyncTransport:
    """`Transport` for tasks."""

    def __init__(self, base_url: str, *, token: str | None, timeout_s: float, patience_s: float) -> None:
        self._http = httpx2.AsyncClient(**client_settings(base_url, token=token, timeout_s=timeout_s))
        self.base_url = base_url.rstrip("/")
        self.patience_s = patience_s
        self._timeout_s = timeout_s

    async def close(self) -> None:
        """Give back the connections."""
        await self._http.aclose()

    async def send(self, call: Call[T]) -> T:
        """Send a call, again where that is safe, and return its result."""
        patience = Patience(self.patience_s if call.is_repeatable else 0.0)
        while True:
            try:
                with unreachable_named(self.base_url):
                    response = await self._http.request(**request_settings(call, timeout_s=self._timeout_s))
                return result_of(call, response, base_url=self.base_url)
            except TROUBLE as error:
                wait_s = patience.wait_s_after(error)
            await asyncio.sleep(wait_s)

    @asynccontextmanager
    async def stream(self, call: Call[Any]) -> AsyncIterator[httpx2.Response]:
        """An answer whose body comes in pieces, from wherever the service sends the caller to.

        416 is the caller's to handle, other problems are raised. The token stays with the service.
        """
        request = self._http.build_request(**request_settings(call, timeout_s=self._timeout_s))
        with unreachable_named(self.base_url):
            response = await self._http.send(request, stream=True, follow_redirects=True)
            try:
                if response.is_error and response.status_code != RANGE_NOT_SATISFIABLE:
                    await response.aread()
                    raise problem(response)
                yield response
            finally:
                await response.aclose()
