"""Stored files: the reference says what was sent, whatever happened on the way."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from support.faulty import Fault, FaultyStore
from wa_core.catalog.files import put_path
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from pathlib import Path

BODY = bytes(range(256)) * 4096


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A local file."""
    path = tmp_path / "file"
    path.write_bytes(BODY)
    return path


def test_a_file_arrives_as_it_is(path: Path) -> None:
    """Size and digest in the reference are those of the bytes in the bucket."""
    store = MemoryStore()
    ref = put_path(store, "a/b", path)
    assert store.get("a/b") == BODY
    assert (ref.key, ref.size_bytes, ref.sha256) == ("a/b", len(BODY), hashlib.sha256(BODY).hexdigest())


@pytest.mark.parametrize("fault", [Fault.DROP_REQUEST, Fault.DROP_RESPONSE])
def test_f5_an_upload_that_is_lost_is_sent_again_from_its_start(path: Path, fault: Fault) -> None:
    """F5: after a lost request or response all of the file is sent again."""
    store = FaultyStore(MemoryStore())
    store.next_call("put", fault)
    put_path(store, "a/b", path)
    assert store.inner.get("a/b") == BODY


def test_an_upload_can_be_given_up(path: Path) -> None:
    """What `on_read` raises ends the upload at once, and is not tried again."""
    store = MemoryStore()
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put_path(store, "a/b", path, on_read=stop)
    assert list(store.list("")) == []
