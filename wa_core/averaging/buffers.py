"""Memory that files are read into and written from.

It knows the machine, not what the bytes are. The invariant: a buffer begins at a memory page, as blocks of files
do. Where `read` and `write` copy with `rep movsb` (processors of the Zen 3 kind), they take four times as long if
the destination lies 1 to 31 bytes behind the source, modulo a page. What NumPy and `bytearray` get lies 16 or 32
bytes behind the beginning of one.
"""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

Raw = NDArray[np.uint8]  # bytes, whatever they stand for


def new_buffer(size_bytes: int) -> Raw:
    """`size_bytes` of memory from the beginning of a page on, as bytes; what they are is undefined."""
    room = np.empty(size_bytes + mmap.PAGESIZE, np.uint8)
    begin = -room.ctypes.data % mmap.PAGESIZE
    return room[begin : begin + size_bytes]
