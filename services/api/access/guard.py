"""Stands before the application and lets no request take more than its share: size, time, host.

It knows no route and no caller. Limits that belong to a body of one kind are `services.api.asked.body`'s; those
here hold for all of them, also for routes that never look at what is sent. The invariant: no request waits without
an end for what its caller still has to send. Connections are `services.api.access.connections`' to watch.
"""

from __future__ import annotations

import asyncio
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.api.problems import RETRY_AFTER_S, HttpProblem, problem_response
from wa_core.packages import MAX_PACKAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_ANY_ADDRESS = {"0.0.0.0", "::", ""}  # noqa: S104  compared with, not bound to


@dataclass(frozen=True, slots=True)
class GuardLimits:
    """What one request may take.

    `answer_deadline_s` is for the beginning of an answer; a long poll takes 60 s of it. `hosts` None lets every
    name through.
    """

    max_headers: int = 100
    max_header_bytes: int = 128 << 10  # a Range header of 10,000 ranges is answered
    max_body_bytes: int = 4 * MAX_PACKAGE_BYTES  # so that packages are refused by a code of their own
    body_deadline_s: float = 130.0
    answer_deadline_s: float = 300.0
    hosts: Hosts | None = None


class Hosts:
    """The names that callers may call this service by.

    A page of another site that gives its own name our address (DNS rebinding) is told from a caller of ours by
    nothing but that name. Addresses are safe: nobody can own one of ours.

    Args:
        bound: the address that the service listens on; when that is all of them, each is a good name.
        more: other names; ``*.example.org`` is all below, and ``*`` all there are.
    """

    def __init__(self, *, bound: str, more: Iterable[str] = ()) -> None:
        names = {name.strip().lower() for name in (*_LOOPBACK, bound, *more)} - {""}
        self._is_any_address = bound in _ANY_ADDRESS
        self._is_any = "*" in names
        self._suffixes = tuple(name[1:] for name in names if name.startswith("*."))
        self._names = names

    def allows(self, host: str) -> bool:
        """Whether a Host header names this service."""
        name = _name_in(host)
        return bool(name) and (
            self._is_any
            or name in self._names
            or name.endswith(self._suffixes)
            or (self._is_any_address and _is_address(name))
        )


class Guard:
    """Wraps the application; see the module's docstring."""

    def __init__(self, app: ASGIApp, limits: GuardLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if (problem := self._fault_of(scope)) is not None:
            await problem_response(problem)(scope, receive, send)
            return
        await _Exchange(self._app, self._limits).run(scope, receive, send)

    def _fault_of(self, scope: Scope) -> HttpProblem | None:
        """What is wrong with a request's head."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        limits, close = self._limits, {"Connection": "close"}
        num_bytes = sum(len(name) + len(value) for name, value in headers) + len(scope["query_string"])
        if len(headers) > limits.max_headers or num_bytes > limits.max_header_bytes:
            detail = f"the request has {len(headers)} headers and {num_bytes} bytes in them and its query; "
            detail += f"at most {limits.max_headers} and {limits.max_header_bytes} are read"
            return HttpProblem(detail, status=431, code="headers_too_large", headers=close)
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        if limits.hosts is not None and not (len(hosts) == 1 and limits.hosts.allows(hosts[0])):
            named = " and ".join(repr(host[:100]) for host in hosts) or "none"
            detail = f"the Host header names {named}, which is not this service"
            return HttpProblem(detail, status=400, code="unknown_host", headers=close)
        length = dict(headers).get(b"content-length", b"0")
        if length.isdigit() and int(length[:19]) > limits.max_body_bytes:
            return _too_large(limits.max_body_bytes)
        return None


class _Exchange:
    """One request and its answer."""

    def __init__(self, app: ASGIApp, limits: GuardLimits) -> None:
        self._app = app
        self._limits = limits
        self._num_bytes = 0
        self._is_whole = False
        self._is_answered = False

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer, within the limits."""
        loop = asyncio.get_running_loop()
        self._body_until = loop.time() + self._limits.body_deadline_s
        self._is_whole = not _has_body(scope)
        try:
            async with asyncio.timeout(self._limits.answer_deadline_s) as self._answer_timeout:
                await self._app(scope, self._receiving(receive), self._sending(send))
        except TimeoutError:
            if self._is_answered or not self._answer_timeout.expired():
                raise
            await problem_response(_too_slow(self._limits.answer_deadline_s))(scope, receive, send)

    def _receiving(self, receive: Receive) -> Receive:
        async def limited() -> Message:
            if self._is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(self._body_until):
                    message = await receive()
            except TimeoutError:
                raise _body_too_slow(self._limits.body_deadline_s) from None
            self._num_bytes += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            if self._num_bytes > self._limits.max_body_bytes:
                raise _too_large(self._limits.max_body_bytes)
            return message

        return limited

    def _sending(self, send: Send) -> Send:
        async def limited(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._is_answered = True
                self._answer_timeout.reschedule(None)
                if not self._is_whole:
                    message = _closing(message)
            await send(message)

        return limited


def _closing(message: Message) -> Message:
    """The answer's head, with which the connection ends: what still comes of a body is read for nobody."""
    if any(name.lower() == b"connection" for name, _ in message["headers"]):
        return message
    return {**message, "headers": [*message["headers"], (b"connection", b"close")]}


def _has_body(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


def _name_in(host: str) -> str:
    """The name in a Host header, without its port and in lower case; empty when it has none."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _too_large(max_bytes: int) -> HttpProblem:
    detail = f"the body is larger than {max_bytes} bytes, the most that any route takes"
    return HttpProblem(detail, status=413, code="body_too_large", headers={"Connection": "close"})


def _body_too_slow(deadline_s: float) -> HttpProblem:
    detail = f"the body had not arrived whole after {deadline_s:g} s"
    return HttpProblem(detail, status=408, code="body_too_slow", headers={"Connection": "close"})


def _too_slow(deadline_s: float) -> HttpProblem:
    detail = f"there was no answer after {deadline_s:g} s"
    return HttpProblem(detail, status=503, code="too_slow", headers={"Retry-After": str(RETRY_AFTER_S)})
