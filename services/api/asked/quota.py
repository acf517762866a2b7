"""How many runs of one owner may wait at a time. Several submissions at once may exceed it by a few."""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.api.problems import HttpProblem
from services.api.state.index import Query
from wa_core.catalog.submissions import is_claimed
from wa_core.records import RunState

if TYPE_CHECKING:
    from services.api.state.catalog import Catalog

_RETRY_AFTER_S = 60


def check_quota(catalog: Catalog, *, owner: str, key: str | None, most: int | None) -> None:
    """Refuse a submission of an owner of whom `most` runs wait; not one that only asks again by its key.

    Raises:
        HttpProblem: 429 ``quota_exceeded``.
    """
    if most is None or (key is not None and is_claimed(catalog.store, key=key, owner=owner)):
        return
    waiting = catalog.index.page(Query(states=[RunState.QUEUED], owner=owner), before=None, limit=most)
    if len(waiting) >= most:
        raise HttpProblem(
            f"{len(waiting)} runs of {owner!r} wait already, and at most {most} may",
            status=429,
            code="quota_exceeded",
            headers={"Retry-After": str(_RETRY_AFTER_S)},
        )
