"""Files on their way to a store: what is sent is what the digest is of."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from wa_core.store.hashed import HashedFile

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 256 << 10


@pytest.mark.parametrize("size_bytes", [0, 1, 4097, BLOCK, 3 * BLOCK + 5])
def test_blocks_are_the_file_and_the_digest_is_theirs(tmp_path: Path, size_bytes: int) -> None:
    """Blocks make up the whole file, every time they are asked for, at any length; its sha256 is known before."""
    body = hashlib.shake_128(b"weights").digest(size_bytes)
    path = tmp_path / "file"
    path.write_bytes(body)
    with path.open("rb", buffering=0) as file:
        hashed = HashedFile(file)
        assert hashed.sha256 == hashlib.sha256(body).hexdigest()
        assert hashed.size_bytes == size_bytes
        for _ in range(2):
            assert b"".join(map(bytes, hashed.blocks())) == body


def test_a_file_is_read_as_any_other_too(tmp_path: Path) -> None:
    """Stores that send no blocks read and seek it."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with path.open("rb", buffering=0) as file:
        hashed = HashedFile(file)
        assert hashed.read() == b"0123456789"
        assert (hashed.seek(4), hashed.read(3), hashed.tell()) == (4, b"456", 7)


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    """What was hashed is no longer there: the upload fails, and nothing else is sent in its place."""
    path = tmp_path / "file"
    path.write_bytes(bytes(BLOCK + 1))
    with path.open("rb", buffering=0) as file:
        hashed = HashedFile(file)
        path.write_bytes(b"")
        with pytest.raises(OSError, match="shorter"):
            list(hashed.blocks())
