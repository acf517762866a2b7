"""Submissions under an Idempotency-Key: however often, and by however many, one key makes one run.

The key's record is created first, and everything about the run follows from it: its id, its time, the identity of
its writes. So whoever sends the key again after a crash finishes the very run that was begun, and two that send it
at once write the same bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.catalog.commit import commit, parse, patiently
from wa_core.catalog.runs import RunLog, create_run
from wa_core.errors import ConflictError, InvalidInputError, ObjectNotFoundError
from wa_core.records import DEFAULT_OWNER, KeyedSubmission, RunSpec

if TYPE_CHECKING:
    from wa_core.clock import Clock
    from wa_core.records import RunRequest
    from wa_core.store.base import ObjectStore


@dataclass(frozen=True, slots=True)
class Claim:
    """What a key stands for, by its record; `is_new` when this call made that: nothing of the run exists yet."""

    spec: RunSpec
    record: KeyedSubmission
    is_new: bool


def claim_key(
    store: ObjectStore,
    request: RunRequest,
    *,
    key: str,
    clock: Clock,
    owner: str = DEFAULT_OWNER,
    known: KeyedSubmission | None = None,
) -> Claim:
    """Let an owner's key stand for a submission, or find what it stands for.

    Args:
        store: the bucket.
        request: the submission.
        key: the key.
        clock: the time.
        owner: whose key it is.
        known: the key's record, for those who have seen it before; it never changes.

    Raises:
        InvalidInputError: it stands for another submission (`idempotency_key_reused`).
        TransientError: the store is away.
    """
    body_sha256 = body_sha256_of(request)
    mine = _new_record(body_sha256, clock=clock)
    keyed = known or _keyed(store, _key_of(owner, key), mine=mine)
    if keyed.body_sha256 != body_sha256:
        raise InvalidInputError(
            f"this Idempotency-Key stands for run {keyed.run_id}, which was submitted with another body; send a "
            f"new key with a new submission",
            code="idempotency_key_reused",
        )
    spec = RunSpec(
        run_id=keyed.run_id, write_id=keyed.write_id, created_at=keyed.created_at, owner=owner, request=request
    )
    return Claim(spec, keyed, is_new=keyed.write_id == mine.write_id)


def body_sha256_of(request: RunRequest) -> str:
    """What a key's record says of the submission that it stands for."""
    return hashlib.sha256(request.model_dump_json(exclude_unset=True).encode()).hexdigest()


def finish(store: ObjectStore, claim: Claim, *, clock: Clock) -> RunLog:
    """Create the run that a key stands for, unless it is whole; its log.

    Raises:
        TransientError: the store is away; doing so again is safe.
    """
    if claim.is_new:
        return create_run(store, claim.spec, clock=clock)
    log = RunLog(store, claim.spec.run_id, clock=clock)
    patiently(log.refresh)
    # A run with a log is whole, and its markers are others' business by now.
    return log if log.entries else create_run(store, claim.spec, clock=clock)


def is_claimed(store: ObjectStore, *, key: str, owner: str = DEFAULT_OWNER) -> bool:
    """Whether an owner's key stands for a submission."""
    try:
        patiently(lambda: store.head(_key_of(owner, key)))
    except ObjectNotFoundError:
        return False
    return True


def _key_of(owner: str, key: str) -> str:
    return layout.keyed_submission(hashlib.sha256(f"{owner}\0{key}".encode()).hexdigest())


def _new_record(body_sha256: str, *, clock: Clock) -> KeyedSubmission:
    now = clock.now()
    return KeyedSubmission(run_id=layout.new_run_id(now), created_at=now, body_sha256=body_sha256)


def _keyed(store: ObjectStore, name: str, *, mine: KeyedSubmission) -> KeyedSubmission:
    """The record of a key; `mine` if there is none. Nearly every key is new, so it is not looked for first."""
    try:
        commit(store, name, mine)
    except ConflictError:
        return _fetch(store, name)
    return mine


def _fetch(store: ObjectStore, name: str) -> KeyedSubmission:
    return parse(KeyedSubmission.model_validate_json, patiently(lambda: store.get(name)), key=name)
