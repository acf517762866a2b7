"""Tokens as the bucket knows them: what one opens and when it ends, and a digest by which it is recognised.

A secret is 256 random bits, so a plain SHA-256 cannot be turned back: slow hashes are for what people choose.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, Field, StringConstraints

from wa_core.records.base import FORMAT, Name, Record, Request, Sha256, new_write_id

Scope = Literal["runs:read", "runs:write", "runs:code", "models:read", "admin"]
TokenId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]

_TEN_YEARS_S = 10 * 365 * 86_400


def _each_once(scopes: list[Scope]) -> list[Scope]:
    if len(set(scopes)) < len(scopes):
        raise ValueError("each scope is named once")
    return scopes


class TokenRequest(Request):
    """The body of a new token. Runs that it submits are owned by `name`; several tokens may have the same."""

    name: Name
    scopes: Annotated[list[Scope], AfterValidator(_each_once)] = Field(min_length=1)
    expires_in_s: int | None = Field(default=None, ge=1, le=_TEN_YEARS_S)


class TokenRecord(Record):
    """A token, without its secret: `sha256` is that of the whole text that callers send. Written once."""

    format: Literal[1] = FORMAT
    write_id: str = Field(default_factory=new_write_id)
    token_id: TokenId
    name: Name
    scopes: list[Scope]
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    last_four: str
    sha256: Sha256


class TokenRevocation(Record):
    """The end of a token, whatever its record says. Written once, and never taken back."""

    format: Literal[1] = FORMAT
    write_id: str = Field(default_factory=new_write_id)
    token_id: TokenId
    revoked_at: AwareDatetime
