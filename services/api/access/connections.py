"""Connections that make no progress are closed: uvicorn waits for ever for a request that never comes whole.

Its own timer runs only between an answer and the next byte. Here a request's head must be whole within a time and
a size, counted from the connection's beginning or the answer before it, however slowly it drips; and whoever asks
must take some of the answer now and then. Bodies are `services.api.access.guard`'s to limit. What an answer is
made of may come from another connection and go past this program (`RELAY`). And when the server ends, what is
asked at that moment on a connection that was kept open is answered still.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING, Any, ClassVar

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from services.api.access.splicing import CAN_SPLICE, splice

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import Scope
    from uvicorn.protocols.http.flow_control import FlowControl
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    #: Moves so many bytes of a request's answer from a socket to whoever asked; how many came.
    Relay = Callable[[Scope, socket.socket, int], Awaitable[int]]

HEAD_DEADLINE_S = 20.0
READ_DEADLINE_S = 60.0
SOURCE_DEADLINE_S = 10.0
LAST_CALL_S = 0.5
MAX_HEAD_BYTES = 160 << 10

#: Where a request's state has the way past this program, if its connection has one.
RELAY = "relay"

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close at once, and forget what was not taken


def patient(
    protocol: type[Any] = AutoHTTPProtocol,
    *,
    head_deadline_s: float = HEAD_DEADLINE_S,
    read_deadline_s: float = READ_DEADLINE_S,
) -> type[asyncio.Protocol]:
    """A protocol of uvicorn's, whose connections are closed for lack of progress.

    Args:
        protocol: one of uvicorn's two.
        head_deadline_s: seconds for the next request's head to be whole.
        read_deadline_s: seconds in which something must be taken of an answer that has filled the buffers.
    """
    deadlines = {"head_deadline_s": head_deadline_s, "read_deadline_s": read_deadline_s}
    return type("PatientProtocol", (_Patience, protocol), deadlines)


class _Patience(asyncio.Protocol):
    """What is put in front of uvicorn's protocol; one for each connection."""

    head_deadline_s: ClassVar[float]
    read_deadline_s: ClassVar[float]
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    cycle: RequestResponseCycle | None  # the newest request and its answer
    flow: FlowControl
    scope: Scope

    _num_head_bytes = 0
    _is_ending = False
    _asking: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting_reading()
        if self._asking is not None:
            self._asking.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        last = self.cycle
        if last is None or last.response_complete:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self.cycle is not last:
            self._num_head_bytes = 0
            if self._is_ending and self.cycle is not None:
                self.cycle.keep_alive = False
        elif self._num_head_bytes > MAX_HEAD_BYTES:
            self.transport.close()

    def shutdown(self) -> None:
        """The server ends: a request may be on its way here, so a connection without one is not closed at once."""
        end = super().shutdown  # type: ignore[misc]  # uvicorn's, not asyncio's
        if self.cycle is None or self.cycle.response_complete:
            self._is_ending = True
            self.loop.call_later(LAST_CALL_S, end)
        else:
            end()

    def on_message_begin(self) -> None:
        """A request begins. Only uvicorn's protocol with httptools calls this; the other one has no `RELAY`."""
        super().on_message_begin()  # type: ignore[misc]  # uvicorn's, not asyncio's
        if CAN_SPLICE and self.transport.get_extra_info("sslcontext") is None:
            self.scope["state"][RELAY] = self._relay

    async def _relay(self, scope: Scope, source: socket.socket, num_bytes: int) -> int:
        """Let the kernel move a part of an answer's body to whoever asked; how many bytes came.

        Raises:
            OSError: nobody takes them any more.
        """
        cycle = self.cycle
        if cycle is None or cycle.scope is not scope:
            return 0  # the next request is here already: not worth finding this one's
        self.transport.set_write_buffer_limits(high=0)
        await self.flow.drain()
        self.transport.set_write_buffer_limits()
        if self.transport.is_closing():
            raise ConnectionResetError
        patience = {"source_patience_s": SOURCE_DEADLINE_S, "patience_s": self.read_deadline_s}
        try:
            with self.transport.get_extra_info("socket").dup() as target:  # stays this one, whatever is closed
                num_moved = await splice(source, target, num_bytes, **patience)
        except TimeoutError:
            self._reset()
            raise
        cycle.expected_content_length -= num_moved  # uvicorn's own count of what is to come
        return num_moved

    def on_response_complete(self) -> None:
        super().on_response_complete()  # type: ignore[misc]  # uvicorn's, not asyncio's
        self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_expecting_reading()

    def _expect_head(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        self._asking = self.loop.call_later(self.head_deadline_s, self._close_unless_asked, self.cycle)

    def _close_unless_asked(self, last: RequestResponseCycle | None) -> None:
        """Close if nothing has been asked since `last` was answered."""
        if self.cycle is last and (last is None or last.response_complete):
            self.transport.close()

    def _expect_reading(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._reading = self.loop.call_later(self.read_deadline_s, self._reset_unless_read, left)

    def _stop_expecting_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _reset_unless_read(self, left: int) -> None:
        """Reset if as much is left as before."""
        if self.transport.get_write_buffer_size() < left:
            self._expect_reading()
        else:
            self._reset()

    def _reset(self) -> None:
        """Close; in an orderly way, this would wait for the same reader."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()
