"""Create-once commits that survive lost responses.

A commit is one small conditional PUT. The first writer of a key wins; nothing is ever overwritten. A client may
see 412 from its *own* earlier try whose response was lost, so every record carries a `write_id`: on a conflict
the key is read back, and the same `write_id` means that this very write has won (ADR 3).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, TypeVar

import stamina
from pydantic import ValidationError

from wa_core.errors import AlreadyExistsError, ConflictError, CorruptError, TransientError

if TYPE_CHECKING:
    from collections.abc import Callable

    from wa_core.records import (
        AssessmentRecord,
        AverageManifest,
        Delivery,
        JobAttempt,
        JobRecord,
        JobResult,
        KeyedSubmission,
        LogEntry,
        RunSpec,
        TokenRecord,
        TokenRevocation,
    )
    from wa_core.store.base import ObjectStore

    Committed = (
        LogEntry
        | AverageManifest
        | AssessmentRecord
        | RunSpec
        | KeyedSubmission
        | Delivery
        | JobRecord
        | JobAttempt
        | JobResult
        | TokenRecord
        | TokenRevocation
    )

T = TypeVar("T")

COMMIT_PATIENCE_S = 120.0


def patiently(call: Callable[[], T], *, patience_s: float = COMMIT_PATIENCE_S) -> T:
    """Call until it does not fail for a passing reason, backing off with jitter, for `patience_s` seconds.

    Raises:
        TransientError: the reason had not passed when the patience ended.
    """
    failed: TransientError | None = None
    try:
        return call()  # nearly always all there is to it, and far cheaper than the machinery below
    except TransientError as error:
        failed = error
    for attempt in stamina.retry_context(
        on=TransientError, attempts=None, timeout=patience_s, wait_initial=0.1, wait_max=3.0, wait_jitter=0.2
    ):
        with attempt:
            if failed is not None:
                first, failed = failed, None
                raise first
            return call()
    raise AssertionError("unreachable: stamina returns or raises")


def commit(
    store: ObjectStore,
    key: str,
    record: Committed,
    *,
    patience_s: float = COMMIT_PATIENCE_S,
) -> bytes:
    """Make `record` the one and only content of `key`; what is stored there, by this try or by an earlier one.

    Raises:
        ConflictError: another write has the key; read it and decide anew.
        TransientError: the store stayed away for longer than the patience; the record may or may not be there,
            and committing the same record again is safe.
    """
    body = record.model_dump_json().encode()
    try:
        patiently(lambda: store.create(key, body), patience_s=patience_s)
    except AlreadyExistsError:
        found = patiently(lambda: store.get(key), patience_s=patience_s)
        if _write_id(found) != record.write_id:
            raise ConflictError(f"{key} was written by somebody else first") from None
        return found
    return body


def parse(parser: Callable[[bytes], T], body: bytes, *, key: str) -> T:
    """Read a committed record.

    Raises:
        CorruptError: the object is no such record, or one of a format that this version does not know.
    """
    try:
        return parser(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise CorruptError(
            f"{key} cannot be read: {where}: {first['msg']}; it was damaged, or written by another version",
            code="record_unreadable",
        ) from None


def _write_id(body: bytes) -> str | None:
    try:
        found = json.loads(body)
    except ValueError:  # whatever it is, it is not ours
        return None
    return found.get("write_id") if isinstance(found, dict) else None
