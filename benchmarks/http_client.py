"""A small HTTP/1.1 client for load: a connection kept open, so that the client costs less than the service.

Reads answers by their Content-Length, and streams by their chunks. Does only what the load script asks for.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:  # noqa: ANN401  JSON
        """The body as JSON."""
        return json.loads(self.body)


class Connection:
    """One connection to a service; an asynchronous context manager. One request at a time."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def ask(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        """Send a request and read its answer."""
        await self._send(method, path, headers=headers or {}, body=body)
        status, found = await self._head()
        length = 0 if status in {204, 304} else int(found.get("content-length", "0"))
        return Answer(status, found, await self._reader.readexactly(length) if length else b"")

    async def events(
        self, path: str, *, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[dict[str, str]]:
        """The server-sent events of a stream."""
        await self._send("GET", path, headers={"Accept": "text/event-stream", **(headers or {})}, body=b"")
        status, _ = await self._head()
        assert status == 200, status
        rest = b""
        while size := int(await self._reader.readline(), 16):
            rest += await self._reader.readexactly(size)
            await self._reader.readline()
            *blocks, rest = rest.split(b"\n\n")
            for block in blocks:
                lines = (line.partition(": ") for line in block.decode().splitlines())
                yield {name: value for name, _, value in lines if name}

    async def _send(self, method: str, path: str, *, headers: Mapping[str, str], body: bytes) -> None:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._host}:{self._port}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines += [f"Content-Length: {len(body)}", "Content-Type: application/json"] if body else []
        self._writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await self._writer.drain()

    async def _head(self) -> tuple[int, dict[str, str]]:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in head[1:] if line)
        return int(head[0].split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


class Follower:
    """A client that follows a run, and when each entry arrived."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.arrived: dict[int, float] = {}
        self.is_told = asyncio.Event()

    async def follow(self, url: str) -> None:
        """Follow until cancelled."""
        async with Connection(url) as connection:
            async for event in connection.events(f"/v1/runs/{self.run_id}/events"):
                self.arrived[int(event["id"])] = time.perf_counter()
                self.is_told.set()
