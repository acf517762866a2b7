"""The tokens of the bucket as a replica knows them: read once, and looked after every few seconds while in use.

A record never changes, so only its revocation is looked for again. The invariant: a token that was revoked
anywhere is refused here within `RECHECK_S` and the time that one look takes.
"""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
from starlette.concurrency import run_in_threadpool

from services.api.access.auth import Caller
from wa_core.catalog.tokens import fetch_token, is_revoked, token_digest, token_id_in
from wa_core.errors import CorruptError, NotFoundError

if TYPE_CHECKING:
    from wa_core.clock import Clock
    from wa_core.records import TokenRecord
    from wa_core.store.base import ObjectStore

log = structlog.get_logger(__name__)

RECHECK_S = 2.0


@dataclass(frozen=True, slots=True)
class _Known:
    """A token, and when (monotonic) the bucket was last asked about it."""

    record: TokenRecord
    is_revoked: bool
    asked_at: float


class TokenBook:
    """Finds callers by their tokens. For one event loop; the bucket is asked in threads."""

    def __init__(self, store: ObjectStore, *, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._known: dict[str, _Known] = {}
        self._looks: dict[str, asyncio.Task[_Known | None]] = {}

    async def caller_of(self, sent: str) -> Caller | None:
        """Who sends this token; None when the bucket has none like it, or it has ended.

        Raises:
            HttpProblem: 503, the store is away and what is known is too old to go by.
        """
        token_id = token_id_in(sent)
        if token_id is None:
            return None
        known = self._known.get(token_id)
        if known is None or not self._holds(known):
            known = await self._look(token_id)
        if known is None or known.is_revoked or not _is_of(sent, known.record):
            return None
        expires_at = known.record.expires_at
        if expires_at is not None and expires_at <= self._clock.now():
            return None
        return Caller.holding(frozenset(known.record.scopes), owner=known.record.name)

    def forget(self, token_id: str) -> None:
        """Ask the bucket at the next use."""
        self._known.pop(token_id, None)

    def _holds(self, known: _Known) -> bool:
        return known.is_revoked or self._clock.monotonic() - known.asked_at < RECHECK_S

    async def _look(self, token_id: str) -> _Known | None:
        """Ask the bucket, once for all that want to know at the same time."""
        look = self._looks.get(token_id)
        if look is None:
            look = asyncio.create_task(run_in_threadpool(self._ask, token_id))
            self._looks[token_id] = look
            look.add_done_callback(lambda _: self._looks.pop(token_id, None))
        return await asyncio.shield(look)

    def _ask(self, token_id: str) -> _Known | None:
        asked_at, known = self._clock.monotonic(), self._known.get(token_id)
        try:
            record = known.record if known else fetch_token(self._store, token_id)
        except NotFoundError:
            return None
        except CorruptError as error:
            log.error("token_unreadable", error=error.message)  # noqa: TRY400  the message says it all
            return None
        found = _Known(record, is_revoked(self._store, token_id), asked_at)
        self._known[token_id] = found
        return found


def _is_of(sent: str, record: TokenRecord) -> bool:
    return hmac.compare_digest(token_digest(sent), record.sha256)
