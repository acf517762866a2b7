"""How another process opens the same bucket."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

from support.faulty import FaultyStore
from wa_core.store.address import address_of, open_address
from wa_core.store.local import LocalStore
from wa_core.store.memory import MemoryStore

if TYPE_CHECKING:
    from pathlib import Path

    from support.seaweed import Seaweed


def test_an_s3_bucket_is_opened_again(seaweed: Seaweed) -> None:
    """The address of a bucket in S3 survives pickling, and what it opens holds the same objects."""
    store = seaweed.new_store()
    store.put("a/b", b"here")

    address = address_of(store)

    assert address is not None
    assert open_address(pickle.loads(pickle.dumps(address))).get("a/b") == b"here"  # noqa: S301  our own


def test_a_folder_is_opened_again(tmp_path: Path) -> None:
    """The address of a folder opens that folder."""
    LocalStore(tmp_path).put("a", b"here")

    address = address_of(LocalStore(tmp_path))

    assert address is not None
    assert open_address(address).get("a") == b"here"


def test_an_address_shows_no_secret(seaweed: Seaweed) -> None:
    """What is printed of an address holds no credentials."""
    assert seaweed.secret_key not in repr(address_of(seaweed.new_store()))


def test_a_store_of_this_process_has_no_address(tmp_path: Path) -> None:
    """Memory, a wrapper and a subclass are not reached from elsewhere."""

    class Own(LocalStore):
        pass

    assert address_of(MemoryStore()) is None
    assert address_of(FaultyStore(LocalStore(tmp_path))) is None
    assert address_of(Own(tmp_path)) is None
