"""Proves at start-up that a store does what commits and folding rely on.

A store that ignores `If-None-Match`, or lets two racing writers both win, would lose run log entries without a
word. So the promises are tried on the store itself, under a prefix of its own, before anything else is.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wa_core.errors import (
    AlreadyExistsError,
    InvalidInputError,
    NotFoundError,
    TransientError,
    UnsafeStoreError,
)
from wa_core.store.base import ByteRange

if TYPE_CHECKING:
    from collections.abc import Callable

    from wa_core.store.base import ObjectStore

NUM_CREATORS = 8
LARGE_BYTES = 9 << 20  # more than one part of a multipart upload
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Check:
    """One promise that was tried. `detail` says what came of it."""

    name: str
    is_ok: bool
    detail: str
    took_s: float


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """All promises that were tried, in order."""

    checks: tuple[Check, ...]

    @property
    def is_ok(self) -> bool:
        """Whether the store keeps all of them."""
        return all(check.is_ok for check in self.checks)

    @property
    def took_s(self) -> float:
        """How long it all took."""
        return sum(check.took_s for check in self.checks)


def probe_store(store: ObjectStore, *, prefix: str = "probe/") -> ProbeReport:
    """Try every promise on `store`, and remove what that wrote.

    Args:
        store: the store.
        prefix: where to write; a random folder below it is used, so probes may run at the same time.

    Returns:
        The report, all of whose checks passed.

    Raises:
        UnsafeStoreError: a check failed; the message names all that did.
        TransientError: the store is away.
        StoreAuthError: it refuses the credentials.
    """
    folder = f"{prefix}{secrets.token_hex(8)}/"
    try:
        report = ProbeReport(tuple(_run(name, check, store, folder) for name, check in _CHECKS.items()))
    finally:
        _clean_up(store, folder)
    if failed := [f"{check.name} ({check.detail})" for check in report.checks if not check.is_ok]:
        raise UnsafeStoreError(
            f"the object store cannot be trusted with commits: {'; '.join(failed)}. Use SeaweedFS 4.18 or newer, "
            "AWS S3, or another store with atomic conditional writes"
        )
    return report


class _BrokenPromiseError(Exception):
    """What a check found wrong."""


def _run(name: str, check: Callable[[ObjectStore, str], str], store: ObjectStore, folder: str) -> Check:
    started = time.monotonic()
    try:
        detail, is_ok = check(store, f"{folder}{name}/"), True
    except (_BrokenPromiseError, NotFoundError, InvalidInputError) as broken:
        detail, is_ok = str(broken), False
    return Check(name, is_ok, detail, time.monotonic() - started)


def _second_create_is_refused(store: ObjectStore, at: str) -> str:
    store.create(f"{at}key", b"first")
    try:
        store.create(f"{at}key", b"second")
    except AlreadyExistsError:
        pass
    else:
        raise _BrokenPromiseError("a second create of a key succeeded")
    _expect(store.get(f"{at}key") == b"first", "a refused create changed the object")
    return "refused, and the object is unchanged"


def _one_creator_wins(store: ObjectStore, at: str) -> str:
    key = f"{at}key"
    with ThreadPoolExecutor(NUM_CREATORS) as pool:
        wins = list(pool.map(lambda writer: _creates(store, key, writer), range(NUM_CREATORS)))
    _expect(sum(wins) == 1, f"{sum(wins)} of {NUM_CREATORS} concurrent creates succeeded")
    _expect(store.get(key) == bytes([wins.index(True)]), "the object is not the winner's")
    return f"one winner of {NUM_CREATORS}"


def _creates(store: ObjectStore, key: str, writer: int) -> bool:
    for _ in range(_TRIES):
        try:
            store.create(key, bytes([writer]))
        except AlreadyExistsError:
            return _has_won_unheard(store, key, writer)
        except TransientError:
            continue  # such as AWS's 409 between racing writers
        return True
    return _has_won_unheard(store, key, writer)


def _has_won_unheard(store: ObjectStore, key: str, writer: int) -> bool:
    """Whether an earlier try of this writer won although its response was lost."""
    return store.get(key) == bytes([writer])


def _ranges_are_exact(store: ObjectStore, at: str) -> str:
    body = bytes(range(256)) * 16
    store.put(f"{at}key", body)
    _expect(store.get(f"{at}key", range=ByteRange(1000, 1500)) == body[1000:1500], "a range read is wrong")
    _expect(b"".join(store.stream(f"{at}key", start=4000)) == body[4000:], "a read from an offset is wrong")
    return "bytes 1000 to 1500 and 4000 to the end are exact"


def _large_puts_read_back(store: ObjectStore, at: str) -> str:
    body = secrets.token_bytes(1 << 20) * (LARGE_BYTES >> 20)
    store.put(f"{at}key", body)
    read = hashlib.sha256()
    for chunk in store.stream(f"{at}key"):
        read.update(chunk)
    _expect(read.digest() == hashlib.sha256(body).digest(), f"{len(body)} bytes read back different")
    return f"{len(body) >> 20} MiB read back with the same SHA-256"


def _lists_are_sorted(store: ObjectStore, at: str) -> str:
    keys = [f"{at}a-b/1", f"{at}a/1", f"{at}a/2", f"{at}b"]
    for key in reversed(keys):
        store.put(key, b"")
    _expect([info.key for info in store.list(at)] == keys, "a listing is incomplete or out of order")
    after = [info.key for info in store.list(at, start_after=keys[1])]
    _expect(after == keys[2:], "a listing from a key on is wrong")
    return "complete, by key, and from a key on"


_CHECKS: dict[str, Callable[[ObjectStore, str], str]] = {
    "second-create-is-refused": _second_create_is_refused,
    "one-creator-wins": _one_creator_wins,
    "ranges-are-exact": _ranges_are_exact,
    "large-puts-read-back": _large_puts_read_back,
    "lists-are-sorted": _lists_are_sorted,
}


def _expect(is_kept: bool, otherwise: str) -> None:  # noqa: FBT001  an assertion
    if not is_kept:
        raise _BrokenPromiseError(otherwise)


def _clean_up(store: ObjectStore, folder: str) -> None:
    try:
        for info in list(store.list(folder)):
            store.delete(info.key)
    except TransientError:
        return  # a few small orphans under probe/ do no harm
