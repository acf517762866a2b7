"""Hints: what saves reading or listing everything from the beginning. Never the truth (ADR 12).

Whoever reads a hint proves it against the records themselves, and does without it where that fails: so a hint that
is missing, old, damaged or forged costs time and changes nothing. A log's hint is proved by the digests in its
entries: its last one is read from the log itself, and each names the digest of the one before. A number's hint
only says where listing begins, and the record of that number must be there.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from wa_core import layout
from wa_core.errors import ObjectNotFoundError, TransientError
from wa_core.records import Entry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from wa_core.store.base import ObjectStore

# Shorter logs and lists are read as they are; a hint is renewed before more than so much comes after it.
MIN_LENGTH = 64
MAX_BEHIND = 64

_entries_adapter: TypeAdapter[list[Entry]] = TypeAdapter(list[Entry])
_number_adapter: TypeAdapter[int] = TypeAdapter(int)
# A list of entries, each on a line of its own, as they are stored; JSON has no bare line break within one.
_OPEN, _BETWEEN, _CLOSE = b"[\n", b",\n", b"\n]"


@dataclass(frozen=True, slots=True)
class LogPrefix:
    """A log's first entries, and the digest of the last of them as stored."""

    entries: list[Entry]
    last_sha256: str


def digest_of(body: bytes) -> str:
    """What an entry calls the one before it by."""
    return hashlib.sha256(body).hexdigest()


def is_worth_renewing(length: int, *, hinted: int) -> bool:
    """Whether a log of `length` entries has outgrown a hint of `hinted`: by an eighth, or by `MAX_BEHIND`."""
    return length >= MIN_LENGTH and length > hinted + min(hinted // 8, MAX_BEHIND)


def read_log_hint(store: ObjectStore, run_id: str) -> LogPrefix | None:
    """A beginning of the run's log that is proved to be what its entries are; None when there is no such thing.

    Raises:
        TransientError: the store is away.
    """
    try:
        body = store.get(layout.log_hint(run_id))
        entries = _entries_adapter.validate_json(body)
        last = store.get(layout.log_entry(run_id, len(entries)))
    except (ObjectNotFoundError, ValidationError):
        return None
    lines = body.removeprefix(_OPEN).removesuffix(_CLOSE).split(_BETWEEN)
    if not entries or len(lines) != len(entries) or lines[-1] != last:
        return None
    digests = [digest_of(line) for line in lines]
    # From the last entry, which is the log's own, each one proves the one before it, down to the first.
    if [entry.previous for entry in entries] != [None, *digests[:-1]] or entries[0].seq != 1:
        return None
    return LogPrefix(entries, digests[-1])


def write_log_hint(store: ObjectStore, run_id: str, entries: Sequence[Entry]) -> None:
    """Keep a copy of the log's beginning, as far as its entries are as this version would write them.

    Raises:
        TransientError: the store is away.
    """
    proved = []
    for entry, after in pairwise(entries):
        line = entry.model_dump_json().encode()
        if after.previous != digest_of(line):
            break
        proved.append(line)
    if len(proved) >= MIN_LENGTH - 1:
        store.put(layout.log_hint(run_id), _OPEN + _BETWEEN.join(proved) + _CLOSE)


def read_number_hint(store: ObjectStore, key: str) -> int | None:
    """The number that a hint gives, if it is one; that its record exists is for the reader to see.

    Raises:
        TransientError: the store is away.
    """
    try:
        number = _number_adapter.validate_json(store.get(key))
    except (ObjectNotFoundError, ValidationError):
        return None
    return number if 1 <= number < 10**8 else None


def write_number_hint(store: ObjectStore, key: str, number: int) -> None:
    """Say that there is a record of this number; that a store is away does no harm."""
    with suppress(TransientError):
        store.put(key, b"%d" % number)
