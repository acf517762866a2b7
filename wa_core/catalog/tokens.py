"""Tokens in the bucket: made once, found by the id that they carry, ended by a record of their own.

Knows no HTTP and nothing of what a scope opens. The invariant: a secret leaves this module once, in the answer
to `create_token`, and is written nowhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
from datetime import timedelta
from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.catalog.commit import commit, parse, patiently
from wa_core.errors import ConflictError, CorruptError, NotFoundError, ObjectNotFoundError
from wa_core.records import TokenRecord, TokenRevocation

if TYPE_CHECKING:
    from wa_core.clock import Clock
    from wa_core.records import TokenRequest
    from wa_core.store.base import ObjectStore

_FORM = re.compile(r"wa_([0-9a-f]{16})_[0-9a-f]{64}")
_SECRET_BYTES = 32


def token_id_in(text: str) -> str | None:
    """The id that a token of this form carries, or None for any other text."""
    found = _FORM.fullmatch(text)
    return found.group(1) if found else None


def token_digest(text: str) -> str:
    """What the bucket keeps of a token."""
    return hashlib.sha256(text.encode()).hexdigest()


def create_token(store: ObjectStore, request: TokenRequest, *, clock: Clock) -> tuple[str, TokenRecord]:
    """Make a token; returns the text that callers send, for the only time, and its record.

    Raises:
        TransientError: the store is away.
    """
    token_id = layout.new_nonce()
    text = f"wa_{token_id}_{secrets.token_hex(_SECRET_BYTES)}"
    now = clock.now()
    lasts_s = request.expires_in_s
    record = TokenRecord(
        token_id=token_id,
        name=request.name,
        scopes=request.scopes,
        created_at=now,
        expires_at=now + timedelta(seconds=lasts_s) if lasts_s is not None else None,
        last_four=text[-4:],
        sha256=token_digest(text),
    )
    commit(store, layout.token(token_id), record)
    return text, record


def fetch_token(store: ObjectStore, token_id: str) -> TokenRecord:
    """A token's record, whether or not it has ended.

    Raises:
        NotFoundError: there is none of this id (`token_not_found`).
        CorruptError: the record cannot be read.
        TransientError: the store is away.
    """
    key = layout.token(token_id)
    try:
        return parse(TokenRecord.model_validate_json, patiently(lambda: store.get(key)), key=key)
    except ObjectNotFoundError:
        raise NotFoundError(f"there is no token {token_id}", code="token_not_found") from None


def is_revoked(store: ObjectStore, token_id: str) -> bool:
    """Whether a token has been revoked, as the bucket has it now."""
    try:
        patiently(lambda: store.head(layout.token_revocation(token_id)))
    except ObjectNotFoundError:
        return False
    return True


def revoke_token(store: ObjectStore, token_id: str, *, clock: Clock) -> None:
    """End a token for good; one that was revoked before stays so.

    Raises:
        NotFoundError: there is none of this id (`token_not_found`).
        TransientError: the store is away; revoking again is safe.
    """
    fetch_token(store, token_id)
    revocation = TokenRevocation(token_id=token_id, revoked_at=clock.now())
    try:
        commit(store, layout.token_revocation(token_id), revocation)
    except ConflictError:
        return  # it was revoked already


def list_tokens(store: ObjectStore) -> list[TokenRecord]:
    """The tokens that were not revoked, oldest first; those that have expired are among them.

    A record that cannot be read opens nothing, and is left out.
    """
    keys = [info.key for info in store.list(layout.TOKENS)]
    revoked = {layout.token_id_of(key) for key in keys if layout.is_token_revocation(key)}
    ids = [layout.token_id_of(key) for key in keys if not layout.is_token_revocation(key)]
    records = []
    for token_id in ids:
        if token_id is not None and token_id not in revoked:
            with contextlib.suppress(CorruptError):
                records.append(fetch_token(store, token_id))
    return sorted(records, key=lambda record: (record.created_at, record.token_id))
