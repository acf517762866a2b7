"""Memory that files are read into."""

from __future__ import annotations

import mmap

import pytest

from wa_core.averaging.buffers import new_buffer


@pytest.mark.parametrize("size_bytes", [1, 4095, 4096, 1 << 20])
def test_a_buffer_begins_at_a_page(size_bytes: int) -> None:
    """A buffer has the size asked for, begins at a memory page, and can be written."""
    buffer = new_buffer(size_bytes)

    assert len(buffer) == size_bytes
    assert buffer.ctypes.data % mmap.PAGESIZE == 0
    assert buffer.flags.writeable
