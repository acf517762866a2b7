"""Submissions under an Idempotency-Key: however often, and by however many, one key makes one run.

The key's record is created first, and everything about the run follows from it: its id, its time, the identity of
its writes. So whoever sends the key again after a crash finishes the very run that was begun, and two that send it
at once write the same bytes.
"""

from __future__ import annotations

import hashlib
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


def submit_once(
    store: ObjectStore,
    request: RunRequest,
    *,
    key: str,
    clock: Clock,
    owner: str = DEFAULT_OWNER,
    traceparent: str | None = None,
) -> RunSpec:
    """The run of an owner's key: created, finished if it was only begun, or found.

    It joins the trace of whoever sent the key first; all else about it is the same whoever creates it.

    Raises:
        InvalidInputError: the key stands for another submission (`idempotency_key_reused`).
        TransientError: the store is away; submitting with the same key again is safe.
    """
    digest = hashlib.sha256(f"{owner}\0{key}".encode()).hexdigest()
    body_sha256 = hashlib.sha256(request.model_dump_json(exclude_unset=True).encode()).hexdigest()
    keyed = _keyed(store, layout.keyed_submission(digest), body_sha256=body_sha256, clock=clock)
    if keyed.body_sha256 != body_sha256:
        raise InvalidInputError(
            f"this Idempotency-Key stands for run {keyed.run_id}, which was submitted with another body; send a "
            f"new key with a new submission",
            code="idempotency_key_reused",
        )
    spec = RunSpec(
        run_id=keyed.run_id,
        write_id=keyed.write_id,
        created_at=keyed.created_at,
        traceparent=traceparent,
        owner=owner,
        request=request,
    )
    log = RunLog(store, spec.run_id, clock=clock)
    patiently(log.refresh)
    if not log.entries:  # else it is whole, and its markers are others' business by now
        create_run(store, spec, clock=clock)
    return spec


def _keyed(store: ObjectStore, name: str, *, body_sha256: str, clock: Clock) -> KeyedSubmission:
    """The record of a key, made if there is none."""
    now = clock.now()
    mine = KeyedSubmission(run_id=layout.new_run_id(now), created_at=now, body_sha256=body_sha256)
    try:
        return _fetch(store, name)
    except ObjectNotFoundError:
        pass
    try:
        commit(store, name, mine)
    except ConflictError:
        return _fetch(store, name)
    return mine


def _fetch(store: ObjectStore, name: str) -> KeyedSubmission:
    return parse(KeyedSubmission.model_validate_json, patiently(lambda: store.get(name)), key=name)
