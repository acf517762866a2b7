"""The half of an HTTP exchange that has no waiting in it: requests made, answers read, problems named.

Both transports use it; it knows HTTP and RFC 9457 and nothing of runs.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from pydantic import ValidationError

from services.client.errors import ApiError, ServiceUnreachableError
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    from services.client.calls import Call

T = TypeVar("T")

RANGE_NOT_SATISFIABLE = 416
_THIS_MACHINE = {"127.0.0.1", "::1", "localhost"}
_CONNECT_TIMEOUT_S = 5.0
_TOKEN = re.compile("[!-~]([ -~]*[!-~])?")


def client_settings(base_url: str, *, token: str | None, timeout_s: float) -> dict[str, Any]:
    """What httpx's clients are made with.

    Raises:
        InvalidInputError: `base_url` is no address, or `token` is none.
    """
    # A proxy meant for the web must not get between a user and a service on the same machine.
    trust_env = _host_in(base_url) not in _THIS_MACHINE
    if token and not _TOKEN.fullmatch(token):
        raise InvalidInputError(
            "the token has spaces around it, line ends or letters that no header takes; check --token or WA_TOKEN"
        )
    return {
        "base_url": base_url.rstrip("/"),
        "headers": {"User-Agent": "wa-client"} | ({"Authorization": f"Bearer {token}"} if token else {}),
        "timeout": httpx2.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S),
        "trust_env": trust_env,
        "verify": _trusted(trust_env=trust_env),
    }


def _host_in(base_url: str) -> str:
    try:
        parts = urlsplit(base_url)
        host, _port = parts.hostname, parts.port
    except ValueError:  # brackets without an address, a port beyond 65535
        host = None
    if not host or not base_url.startswith(("http://", "https://")):
        raise InvalidInputError(f"the service's address is {base_url!r}; write http://HOST:PORT")
    return host


@cache
def _trusted(*, trust_env: bool) -> ssl.SSLContext:
    """What TLS connections trust, shared by all clients: to read it takes longer than most requests."""
    return httpx2.create_ssl_context(trust_env=trust_env)


def request_settings(call: Call[Any], *, timeout_s: float) -> dict[str, Any]:
    """What httpx sends a call with."""
    return {
        "method": call.method,
        "url": call.path,
        "params": {name: value for name, value in call.query.items() if value is not None},
        "json": call.body,
        "content": call.content,
        "headers": dict(call.headers),
        "timeout": httpx2.Timeout(timeout_s + call.extra_s, connect=_CONNECT_TIMEOUT_S),
    }


def result_of(call: Call[T], response: httpx2.Response, *, base_url: str) -> T:
    """What a whole answer says.

    Raises:
        ApiError: it is a problem; or no JSON; or JSON that this client cannot make sense of.
    """
    if not response.is_success:
        raise problem(response)
    try:
        said = response.text if call.is_text else response.json() if response.content else None
    except ValueError:
        raise ApiError(
            f"what answers at {base_url} does not speak JSON; set WA_API_URL to the service's address",
            status=response.status_code,
            code="not_json",
        ) from None
    try:
        return call.read(said)
    except (ValidationError, KeyError, TypeError) as error:
        raise ApiError(
            f"the answer to {call.method} {call.path} is not what this client reads ({_first_line(error)}); "
            "use the client of the service's version",
            status=response.status_code,
            code="unexpected_answer",
        ) from error


def problem(response: httpx2.Response) -> ApiError:
    """The exception for an answer that is no success, whether or not it is a problem document."""
    try:
        document = response.json()
    except ValueError:
        document = None
    fields = document if isinstance(document, dict) else {}
    return ApiError(
        str(fields.get("detail") or f"the service answered {response.status_code} {response.reason_phrase}"),
        status=response.status_code,
        code=str(fields.get("code") or f"http_{response.status_code}"),
        hint=fields.get("hint"),
        errors=fields.get("errors"),
        retry_after_s=_seconds(response.headers.get("Retry-After", "")),
        path=response.request.url.path,
    )


@contextmanager
def unreachable_named(base_url: str) -> Iterator[None]:
    """Turn what can break on the way into `ServiceUnreachableError`."""
    try:
        yield
    except (httpx2.TransportError, httpx2.InvalidURL) as error:
        raise ServiceUnreachableError(
            f"no answer from {base_url}: {error or type(error).__name__}; "
            "start the service with `wa up`, or set WA_API_URL to where it runs"
        ) from None


def _seconds(retry_after: str) -> float | None:
    """Seconds from now, of either form that RFC 9110 knows."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        at = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
    return f"{type(error).__name__}: {error}"
