from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from support.faulty import Fault, FaultyStore
from wa_core.errors import AlreadyExistsError, ConfigurationError, StoreUnavailableError, UnsafeStoreError
from wa_core.store.local import LocalStore
from wa_core.store.memory import MemoryStore
from wa_core.store.probe import probe_store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.seaweed import Seaweed
    from wa_core.store.base import ByteRange, ObjectInfo


NAMES = [
    "second-create-is-refused",
    "one-creator-wins",
    "ranges-are-exact",
    "large-puts-read-back",
    "lists-are-sorted",
]


def test_seaweedfs_passes_quickly_and_stays_clean(seaweed: Seaweed) -> None:
    """A real SeaweedFS passes every check in a few seconds, and the probe leaves nothing behind.

    Its conditional *multipart completion* races (F12); commits are single PUTs, so only those are probed.
    """
    store = seaweed.new_store()

    report = probe_store(store)

    assert report.is_ok
    assert [check.name for check in report.checks] == NAMES
    assert 0 < report.took_s < 60  # about 2 s on an idle machine; this one may be busy
    assert list(store.list("")) == []


def test_memory_and_files_pass(tmp_path: Path) -> None:
    """The other adapters keep the same promises."""
    for store in (MemoryStore(), LocalStore(tmp_path)):
        assert probe_store(store, prefix="elsewhere/").is_ok
        assert list(store.list("")) == []


def test_f11_a_store_that_ignores_conditions_is_refused_by_name() -> None:
    """F11: a store whose create overwrites is refused; the message names the failed probes and what to use."""
    store = FaultyStore(MemoryStore(), rates={Fault.IGNORE_CONDITION: 1.0}, operations=frozenset({"create"}))

    with pytest.raises(UnsafeStoreError) as refused:
        probe_store(store)

    assert isinstance(refused.value, ConfigurationError)
    assert "second-create-is-refused (a second create of a key succeeded)" in refused.value.message
    assert "one-creator-wins (8 of 8 concurrent creates succeeded)" in refused.value.message
    assert "Use SeaweedFS" in refused.value.message
    assert list(store.inner.list("")) == []


def test_check_then_write_is_caught() -> None:
    """A store that looks before it writes, rather than deciding in one step, lets two win and is refused."""
    with pytest.raises(UnsafeStoreError, match=r"one-creator-wins \(\d of 8 concurrent creates succeeded\)"):
        probe_store(RacyStore())


def test_wrong_ranges_are_caught() -> None:
    """A store that answers a range with something else is refused."""
    with pytest.raises(UnsafeStoreError, match="ranges-are-exact"):
        probe_store(RangelessStore())


def test_spoiled_uploads_are_caught() -> None:
    """A store that returns other bytes than it was given is refused."""
    store = FaultyStore(MemoryStore(), rates={Fault.FLIP_BIT: 1.0}, operations=frozenset({"stream"}))

    with pytest.raises(UnsafeStoreError, match="large-puts-read-back"):
        probe_store(store)


def test_unsorted_listings_are_caught() -> None:
    """A store that lists in another order is refused."""
    with pytest.raises(UnsafeStoreError, match="lists-are-sorted"):
        probe_store(BackwardStore())


def test_lost_answers_among_racers_are_no_fault() -> None:
    """A racer whose answer was lost tries again, and the probe still counts one winner."""
    store = FaultyStore(MemoryStore())
    store.next_call("create", *[Fault.DELAY] * 2, *[Fault.DROP_RESPONSE, Fault.DROP_REQUEST] * 4)

    assert probe_store(store).is_ok


def test_a_store_that_is_away_is_not_called_unsafe() -> None:
    """An unreachable store raises the passing error, so that a process waits rather than giving up."""
    store = FaultyStore(MemoryStore())
    store.is_away = True

    with pytest.raises(StoreUnavailableError):
        probe_store(store)


class RacyStore(MemoryStore):
    """Creates in two steps; all racers of one key pass the first before any takes the second."""

    def __init__(self) -> None:
        super().__init__()
        self._together = threading.Barrier(8)

    def create(self, key: str, body: bytes) -> None:
        """Look, wait for the others, then write."""
        is_taken = any(info.key == key for info in self.list(key))
        if "one-creator" in key:
            self._together.wait()
        if is_taken:
            raise AlreadyExistsError(key)
        self.put(key, body)


class RangelessStore(MemoryStore):
    """Ignores ranges."""

    def get(self, key: str, range: ByteRange | None = None) -> bytes:
        """The whole object, whatever was asked."""
        return super().get(key)


class BackwardStore(MemoryStore):
    """Lists from the end."""

    def list(self, prefix: str, start_after: str = "", *, delimiter: str | None = None) -> Iterator[ObjectInfo]:
        """The right keys in the wrong order."""
        return reversed(list(super().list(prefix, start_after=start_after, delimiter=delimiter)))
