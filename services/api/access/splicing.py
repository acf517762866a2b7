"""Lets the kernel move bytes from one connection to another, so that this program neither copies nor holds them.

It knows sockets and pipes; neither HTTP nor what is moved. The invariant: whatever it says has been moved has left
for the target, in order, and nothing more has been taken from the source.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Whether this system has a way for it.
CAN_SPLICE = hasattr(os, "splice") and hasattr(fcntl, "F_SETPIPE_SZ")

_PIPE_BYTES = 1 << 20
_WORTH_WAKING_BYTES = 256 << 10  # so much, or the rest, should have come before it is moved
_NOW = getattr(os, "SPLICE_F_NONBLOCK", 0) | getattr(os, "SPLICE_F_MOVE", 0)


async def splice(
    source: socket.socket, target: socket.socket, num_bytes: int, *, source_patience_s: float, patience_s: float
) -> int:
    """Move up to `num_bytes`; how many there were before the source ended, broke or gave none for its time.

    Args:
        source: where they come from; does not block.
        target: where they go; does not block.
        num_bytes: how many.
        source_patience_s: how long the source may give nothing.
        patience_s: how long the target may take nothing.

    Raises:
        OSError: the target is broken, or took nothing for its time; or there is no pipe to be had.
    """
    left = num_bytes
    with _pipe() as (outlet, inlet):
        while left:
            try:
                num = os.splice(source.fileno(), inlet, min(left, _PIPE_BYTES), flags=_NOW)
            except BlockingIOError:
                source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, min(left, _WORTH_WAKING_BYTES))
                if not await _is_readable(source, within_s=source_patience_s):
                    break
                continue
            except OSError:
                break
            if num == 0:
                break
            await _pour(outlet, target, num, patience_s=patience_s)
            left -= num
            await asyncio.sleep(0)  # others have a turn after each megabyte
    return num_bytes - left


async def _pour(outlet: int, target: socket.socket, num_bytes: int, *, patience_s: float) -> None:
    """Empty the pipe: what was taken from the source must reach the target."""
    loop, left = asyncio.get_running_loop(), num_bytes
    while left:
        try:
            left -= os.splice(outlet, target.fileno(), left, flags=_NOW)
        except BlockingIOError:
            async with asyncio.timeout(patience_s):
                await _ready(target, loop.add_writer, loop.remove_writer)


async def _is_readable(source: socket.socket, *, within_s: float) -> bool:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(within_s):
            await _ready(source, loop.add_reader, loop.remove_reader)
    except TimeoutError:
        return False
    return True


async def _ready(one: socket.socket, watch: Callable[..., object], forget: Callable[..., object]) -> None:
    is_ready = asyncio.Event()
    watch(one, is_ready.set)
    try:
        await is_ready.wait()
    finally:
        forget(one)


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    outlet, inlet = os.pipe()
    try:
        with suppress(OSError):  # this user's pipes hold a lot already: a small one will do
            fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        yield outlet, inlet
    finally:
        os.close(outlet)
        os.close(inlet)
