"""A proxy between S3 clients and a real server that spoils what it is told to, and counts what goes through.

It runs in a thread of the test, so that averagers in other processes can be connected to it and the test can
change its rules at any time. It knows HTTP and S3's paths, and nothing of what is stored.
"""

from __future__ import annotations

import asyncio
import random
import re
import threading
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

from support.wire import BrokenMessageError, Call, Head, body_of, has_body, read_head

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

_CODES = {503: "SlowDown", 500: "InternalError", 429: "TooManyRequests", 409: "ConditionalRequestConflict"}
_CODES |= {403: "InvalidAccessKeyId"}


class Spoil(StrEnum):
    """What can be done to a request."""

    LOSE_REQUEST = "lose_request"
    """The connection is reset; the server hears nothing."""
    LOSE_RESPONSE = "lose_response"
    """The server does it all and answers; the connection is reset before a byte of it gets through."""
    HALF_REQUEST = "half_request"
    """Half of the body reaches the server, then both connections are reset."""
    STALL = "stall"
    """Half of the body reaches the server; the rest is on its way until `FaultProxy.release`, and then lost."""
    FLIP_REQUEST = "flip_request"
    """One bit of the request's body is another one."""
    TRUNCATE = "truncate"
    """Half of the response's body gets through, then the connection ends."""
    FLIP = "flip"
    """One bit of the response's body is another one."""
    STATUS = "status"
    """The proxy answers with `status`; the server hears nothing."""
    HIDE_CONFLICT = "hide_conflict"
    """A 412 becomes a 200, as from a store that does not know conditional writes."""
    DELAY = "delay"
    """It takes `delay_s` give or take `spread_s` longer."""
    HOLD = "hold"
    """It stays on its way until `FaultProxy.release` is called."""


@dataclass
class Rule:
    """Spoils requests: those of `operations` (None: all) whose key matches, as likely as `rate`, `times` at most.

    `key` is a regular expression that is searched for.
    """

    spoil: Spoil
    rate: float = 1.0
    operations: frozenset[str] | None = None
    key: str = ""
    times: int | None = None
    status: int = 503
    delay_s: float = 0.0
    spread_s: float = 0.0

    def fits(self, call: Call) -> bool:
        """Whether it may spoil this call."""
        is_left = self.times is None or self.times > 0
        is_meant = self.operations is None or call.operation in self.operations
        return is_left and is_meant and re.search(self.key, call.key) is not None


@dataclass
class Traffic:
    """What was asked for one key, and the bytes of bodies that went through for it."""

    calls: Counter[str] = field(default_factory=Counter)
    sent_bytes: int = 0
    received_bytes: int = 0


class FaultProxy:
    """Listens on a free loopback port; a context manager.

    Args:
        target_url: the real server's endpoint.
        rules: what to spoil; the first that fits and is drawn decides. May be changed at any time.
        seed: decides the chances.

    `after_answer` is called, in the thread of the proxy, with the number of answers whenever the server has given
    one, before any of it gets through.
    """

    def __init__(self, target_url: str, *, rules: Sequence[Rule] = (), seed: int = 0) -> None:
        parts = urlsplit(target_url)
        self._target = (parts.hostname or "", parts.port or 80)
        self.rules = list(rules)
        self.is_down = False
        self.bytes_per_s: float | None = None
        self.traffic: defaultdict[str, Traffic] = defaultdict(Traffic)
        self.spoiled: Counter[Spoil] = Counter()
        self.after_answer: Callable[[int], None] = lambda _num_answers: None
        self.num_answers = 0
        self._released = asyncio.Event()
        self.calls: list[Call] = []
        self._chance = random.Random(seed)
        self._free_at = 0.0
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._port = 0

    @property
    def endpoint_url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self._port = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(timeout=60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=60)
        self._loop.close()

    def forget(self) -> None:
        """No rules, no counts, no throttling."""
        self.rules = []
        self.bytes_per_s = None
        self.after_answer = lambda _num_answers: None
        self.num_answers = 0
        self.calls.clear()
        self.traffic.clear()
        self.spoiled.clear()

    def release(self) -> None:
        """Let everything that is held through, and hold nothing more."""
        self._loop.call_soon_threadsafe(self._released.set)

    def go_down(self) -> None:
        """From now on every connection is reset, those under way too."""
        self.is_down = True
        self._loop.call_soon_threadsafe(self._abort_all)

    def come_back(self) -> None:
        """Let connections through again."""
        self.is_down = False

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=1 << 20)
        return int(self._server.sockets[0].getsockname()[1])

    async def _close(self) -> None:
        self._server.close()
        self._abort_all()
        here = asyncio.current_task()
        rest = [task for task in asyncio.all_tasks() if task is not here]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def _abort_all(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            if not self.is_down:
                await _Conversation(self, reader, writer).run()
        except (OSError, BrokenMessageError, asyncio.IncompleteReadError):
            writer.transport.abort()
        except asyncio.CancelledError:
            pass  # the proxy closes; a task that ends as cancelled would be reported as if it had failed
        finally:
            self._open.discard(writer)
            writer.transport.abort() if self.is_down else writer.close()

    def draw(self, call: Call) -> Rule | None:
        """The rule that spoils this call, if any."""
        self.calls.append(call)
        self.traffic[call.key].calls[call.operation] += 1
        for rule in self.rules:
            if rule.fits(call) and self._chance.random() < rule.rate:
                if rule.times is not None:
                    rule.times -= 1
                self.spoiled[rule.spoil] += 1
                return rule
        return None

    def delay_of(self, rule: Rule) -> float:
        """Seconds that a delayed call waits."""
        return max(0.0, self._chance.uniform(rule.delay_s - rule.spread_s, rule.delay_s + rule.spread_s))

    def flipped(self, piece: bytes) -> bytes:
        """A piece with one bit changed."""
        spoiled = bytearray(piece)
        at = self._chance.randrange(8 * len(piece))
        spoiled[at // 8] ^= 1 << (at % 8)
        return bytes(spoiled)

    async def until_released(self) -> None:
        """Wait for `release`."""
        await self._released.wait()

    def count_answer(self) -> None:
        """The server has answered."""
        self.num_answers += 1
        self.after_answer(self.num_answers)

    async def pace(self, num_bytes: int) -> None:
        """Wait until so many bytes fit through the link."""
        if self.bytes_per_s is None:
            return
        now = self._loop.time()
        self._free_at = max(self._free_at, now - 0.05) + num_bytes / self.bytes_per_s
        await asyncio.sleep(self._free_at - now)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the real server."""
        return await asyncio.open_connection(*self._target, limit=1 << 20)


class _ResetError(OSError):
    """The client's connection is to be reset."""


class _Conversation:
    """One client connection, request by request, over one connection to the server."""

    def __init__(self, proxy: FaultProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self) -> None:
        """Serve until either side ends."""
        try:
            while head := await read_head(self._reader):
                if not await self._serve(head, Call.of(head)):
                    break
        finally:
            self._drop_server()

    async def _serve(self, head: Head, call: Call) -> bool:
        """One request; returns whether another may follow."""
        rule = self._proxy.draw(call)
        spoil = rule.spoil if rule else None
        if rule and spoil is Spoil.DELAY:
            await asyncio.sleep(self._proxy.delay_of(rule))
        if spoil is Spoil.HOLD:
            await self._proxy.until_released()
        if spoil is Spoil.LOSE_REQUEST:
            raise _ResetError
        if "expect" in head.fields:
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if rule and spoil is Spoil.STATUS:
            return await self._answer(head, rule.status)
        await self._send_on(head, call, spoil)
        return await self._send_back(call, spoil)

    async def _answer(self, head: Head, status: int) -> bool:
        async for _ in body_of(head, self._reader, is_response=False):
            pass
        body = f"<Error><Code>{_CODES[status]}</Code><Message>on purpose</Message></Error>".encode()
        fields = f"Content-Type: application/xml\r\nContent-Length: {len(body)}"
        self._writer.write(f"HTTP/1.1 {status} Spoiled\r\n{fields}\r\n\r\n".encode())
        if not head.start.startswith("HEAD "):
            self._writer.write(body)
        await self._writer.drain()
        return not head.is_last

    async def _send_on(self, head: Head, call: Call, spoil: Spoil | None) -> None:
        """The request, to the server."""
        if self._server is None or self._server[0].at_eof():
            self._drop_server()
            self._server = await self._proxy.connect()
        writer = self._server[1]
        writer.write(head.encoded(without="expect"))
        limit = (head.size_bytes or 0) // 2 if spoil in {Spoil.HALF_REQUEST, Spoil.STALL} else None
        sent = 0
        async for piece in body_of(head, self._reader, is_response=False):
            part = piece if limit is None else piece[: limit - sent]
            if spoil is Spoil.FLIP_REQUEST and not sent:
                part = self._proxy.flipped(part)
            await self._proxy.pace(len(part))
            writer.write(part)
            await writer.drain()
            sent += len(part)
            self._proxy.traffic[call.key].sent_bytes += len(part)
            if spoil is Spoil.STALL and sent == limit:
                await self._proxy.until_released()
        if spoil in {Spoil.HALF_REQUEST, Spoil.STALL}:
            writer.transport.abort()
            raise _ResetError

    async def _send_back(self, call: Call, spoil: Spoil | None) -> bool:
        """The response, to the client."""
        assert self._server is not None
        reader = self._server[0]
        head = await read_head(reader)
        while head is not None and head.status < 200:
            head = await read_head(reader)
        if head is None:
            raise BrokenMessageError("the server ended without an answer")
        self._proxy.count_answer()
        is_whole = has_body(head, operation=call.operation)
        body = body_of(head, reader, is_response=True) if is_whole else _nothing()
        if spoil is Spoil.LOSE_RESPONSE or (spoil is Spoil.HIDE_CONFLICT and head.status == 412):
            async for _ in body:
                pass
            if spoil is Spoil.LOSE_RESPONSE:
                raise _ResetError
            self._writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            return True
        self._writer.write(head.encoded())
        is_cut = await self._body_back(body, call, spoil, size_bytes=head.size_bytes or 0)
        await self._writer.drain()
        if head.is_last or (is_whole and head.size_bytes is None and not head.is_chunked):
            self._drop_server()
            return False
        return not is_cut

    async def _body_back(
        self, body: AsyncIterator[bytes], call: Call, spoil: Spoil | None, *, size_bytes: int
    ) -> bool:
        """The response's body; returns whether it was cut."""
        limit = size_bytes // 2 if spoil is Spoil.TRUNCATE and size_bytes else None
        sent = 0
        async for piece in body:
            part = self._proxy.flipped(piece) if spoil is Spoil.FLIP and not sent else piece
            part = part if limit is None else part[: limit - sent]
            await self._proxy.pace(len(part))
            self._writer.write(part)
            await self._writer.drain()
            sent += len(part)
            self._proxy.traffic[call.key].received_bytes += len(part)
            if limit is not None and sent >= limit:
                self._drop_server()
                return True
        return False

    def _drop_server(self) -> None:
        if self._server is not None:
            with suppress(OSError):
                self._server[1].transport.abort()
            self._server = None


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""
