"""Tokens in the bucket, without any HTTP."""

from __future__ import annotations

import hashlib

import pytest

from wa_core import layout
from wa_core.catalog.tokens import create_token, fetch_token, is_revoked, list_tokens, revoke_token, token_id_in
from wa_core.clock import ManualClock
from wa_core.errors import InvalidInputError, NotFoundError
from wa_core.records import TokenRequest
from wa_core.store.memory import MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    """An empty bucket."""
    return MemoryStore()


def everything_in(store: MemoryStore) -> bytes:
    """All bytes and keys of a bucket."""
    return b"".join(info.key.encode() + store.get(info.key) for info in store.list(""))


def test_the_bucket_holds_a_digest_and_no_secret(store: MemoryStore) -> None:
    """Of a token's 256 random bits the bucket has a SHA-256 and four digits, under a key with its id."""
    secret, record = create_token(store, TokenRequest(name="ci", scopes=["runs:read"]), clock=ManualClock())

    assert len(secret.rpartition("_")[2]) == 64
    assert secret.encode() not in everything_in(store)
    assert secret.rpartition("_")[2].encode() not in everything_in(store)
    assert record.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert fetch_token(store, token_id_in(secret) or "") == record
    assert [info.key for info in store.list("")] == [f"tokens/{record.token_id}.json"]


def test_revoking_is_a_record_of_its_own(store: MemoryStore) -> None:
    """Revoking adds a record and deletes none; it may be done twice; the token is listed no more."""
    clock = ManualClock()
    _, kept = create_token(store, TokenRequest(name="kept", scopes=["admin"]), clock=clock)
    _, lost = create_token(store, TokenRequest(name="lost", scopes=["admin"]), clock=clock)

    for _ in range(2):
        revoke_token(store, lost.token_id, clock=clock)

    assert [record.token_id for record in list_tokens(store)] == [kept.token_id]
    assert (is_revoked(store, kept.token_id), is_revoked(store, lost.token_id)) == (False, True)
    assert fetch_token(store, lost.token_id) == lost
    assert store.get(layout.token_revocation(lost.token_id))


def test_an_unknown_token_cannot_be_revoked(store: MemoryStore) -> None:
    """No revocation is written for a token that is not there."""
    with pytest.raises(NotFoundError, match="0123456789abcdef"):
        revoke_token(store, "0123456789abcdef", clock=ManualClock())
    assert not list(store.list(""))


@pytest.mark.parametrize("token_id", ["", "../x", "0123456789abcdef.revoked", "0123456789ABCDEF", "0" * 17])
def test_an_impossible_id_reaches_no_key(token_id: str) -> None:
    """Bad input 5: only 16 hexadecimal digits are a token's id."""
    with pytest.raises(InvalidInputError):
        layout.token(token_id)


def test_a_record_that_cannot_be_read_is_left_out(store: MemoryStore) -> None:
    """F27: a token of another version neither opens anything nor hides the others."""
    clock = ManualClock()
    _, record = create_token(store, TokenRequest(name="ci", scopes=["admin"]), clock=clock)
    store.create(layout.token("f" * 16), b'{"format": 9}')

    assert list_tokens(store) == [record]
