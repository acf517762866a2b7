"""One HTTP exchange with the service: the token, safe retries, and problems turned into exceptions.

It knows HTTP and RFC 9457 and nothing of runs. Only requests without effects are tried again, and those that an
Idempotency-Key lets happen once.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx2

from services.client.errors import ApiError, ServiceUnreachableError
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 2.0
_RANGE_NOT_SATISFIABLE = 416
_UNAVAILABLE = 503
_THIS_MACHINE = {"127.0.0.1", "::1", "localhost"}
_CONNECT_TIMEOUT_S = 5.0

Query = dict[str, str | int | float | None]


class Transport:
    """Requests to one service.

    Args:
        base_url: such as ``http://127.0.0.1:8000``.
        token: the bearer token, if the service wants one.
        timeout_s: how long one answer may take to begin.
        patience_s: for how long a request that may be is tried again while the service or its store is away.
    """

    def __init__(self, base_url: str, *, token: str | None, timeout_s: float, patience_s: float) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise InvalidInputError(f"the service's address is {base_url!r}; write http://HOST:PORT")
        headers = {"User-Agent": "wa-client"} | ({"Authorization": f"Bearer {token}"} if token else {})
        self.base_url = base_url.rstrip("/")
        self._patience_s = patience_s
        self._timeout_s = timeout_s
        self._http = httpx2.Client(
            base_url=self.base_url,
            headers=headers,
            timeout=httpx2.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S),
            # A proxy meant for the web must not get between a user and a service on the same machine.
            trust_env=urlsplit(base_url).hostname not in _THIS_MACHINE,
        )

    def close(self) -> None:
        """Give back the connections."""
        self._http.close()

    def get(self, path: str, *, query: Query | None = None, extra_s: float = 0.0) -> Any:  # noqa: ANN401  JSON
        """GET, tried again while the service is away; the JSON that it answers.

        `extra_s` is how much longer than usual the service has been asked to take.
        """
        return self._patiently(lambda: self._exchange("GET", path, query=query, extra_s=extra_s))

    def post(self, path: str, *, body: object = None, key: str | None = None, query: Query | None = None) -> Any:  # noqa: ANN401  JSON
        """POST, and return the JSON that it answers.

        With an Idempotency-Key `key` it is tried again while the service is away; without one it is sent once.
        """
        if key is None:
            return self._exchange("POST", path, body=body, query=query)
        headers = {"Idempotency-Key": key}
        return self._patiently(lambda: self._exchange("POST", path, body=body, query=query, headers=headers))

    def upload(self, path: str, *, body: bytes, content_type: str) -> Any:  # noqa: ANN401  JSON
        """POST bytes once, and return the JSON that it answers."""
        return self._exchange("POST", path, content=body, headers={"Content-Type": content_type})

    @contextmanager
    def stream(
        self, path: str, *, query: Query | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[httpx2.Response]:
        """GET a body in pieces; 416 is the caller's to handle, other problems are raised."""
        request = self._http.build_request("GET", path, params=_present(query), headers=headers)
        with self._unreachable_named():
            response = self._http.send(request, stream=True)
            try:
                if response.is_error and response.status_code != _RANGE_NOT_SATISFIABLE:
                    response.read()
                    raise problem(response)
                yield response
            finally:
                response.close()

    def _patiently(self, exchange: Callable[[], Any]) -> Any:  # noqa: ANN401  JSON
        deadline = time.monotonic() + self._patience_s
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                return exchange()
            except (ServiceUnreachableError, ApiError) as error:
                if not is_passing(error) or time.monotonic() + wait_s > deadline:
                    raise
            time.sleep(wait_s)
            wait_s = min(wait_s * 2, _LONGEST_WAIT_S)

    def _exchange(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: object = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        extra_s: float = 0.0,
    ) -> Any:  # noqa: ANN401  JSON
        timeout = httpx2.Timeout(self._timeout_s + extra_s, connect=_CONNECT_TIMEOUT_S)
        with self._unreachable_named():
            response = self._http.request(
                method, path, params=_present(query), json=body, content=content, headers=headers, timeout=timeout
            )
        if not response.is_success:
            raise problem(response)
        try:
            return response.json()
        except ValueError:
            raise ApiError(
                f"what answers at {self.base_url} does not speak JSON; set WA_API_URL to the service's address",
                status=response.status_code,
                code="not_json",
            ) from None

    @contextmanager
    def _unreachable_named(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise ServiceUnreachableError(
                f"no answer from {self.base_url}: {error or type(error).__name__}; "
                "start the service with `wa up`, or set WA_API_URL to where it runs"
            ) from None


def is_passing(error: ServiceUnreachableError | ApiError) -> bool:
    """Whether the same request may well succeed a little later."""
    return isinstance(error, ServiceUnreachableError) or error.status == _UNAVAILABLE


def problem(response: httpx2.Response) -> ApiError:
    """The exception for an answer that is no success, whether or not it is a problem document."""
    try:
        document = response.json()
    except ValueError:
        document = None
    fields = document if isinstance(document, dict) else {}
    retry_after = response.headers.get("Retry-After", "")
    return ApiError(
        str(fields.get("detail") or f"the service answered {response.status_code} {response.reason_phrase}"),
        status=response.status_code,
        code=str(fields.get("code") or f"http_{response.status_code}"),
        hint=fields.get("hint"),
        errors=fields.get("errors"),
        retry_after_s=float(retry_after) if retry_after.isdecimal() else None,
    )


def _present(query: Query | None) -> dict[str, str | int | float]:
    return {key: value for key, value in (query or {}).items() if value is not None}
