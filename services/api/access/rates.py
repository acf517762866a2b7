"""How often a caller may ask: by owner, or by address where nobody has a name. Counted in this replica alone.

Windows are fixed, as users count: 600 a minute is at most 600 in each minute. The invariant: one owner's requests
never use up another's.
"""

import math
import time
from collections.abc import Mapping

from fastapi import Request
from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from services.api.access.headers import ADDED
from services.api.problems import HttpProblem
from wa_core.errors import ConfigurationError

REQUESTS, SUBMISSIONS = "requests", "submissions"


class RateLimits:
    """Limits by name; what has none is not limited.

    Args:
        spelled: name -> limit, such as ``600/minute``; None for no limit.

    Raises:
        ConfigurationError: a limit is of no known form.
    """

    def __init__(self, spelled: Mapping[str, str | None]) -> None:
        self._limits = {name: _parse(name, text) for name, text in spelled.items() if text}
        self._limiter = FixedWindowRateLimiter(MemoryStorage())

    async def take(self, request: Request, name: str, *, who: str) -> None:
        """Count one request of `who`, and tell the answer how many are left.

        Raises:
            HttpProblem: 429 ``rate_limited``, with the seconds after which the next one is let through.
        """
        limit = self._limits.get(name)
        if limit is None:
            return
        is_allowed = await self._limiter.hit(limit, name, who)
        window = await self._limiter.get_window_stats(limit, name, who)
        wait_s = max(1, math.ceil(window.reset_time - time.time()))
        quota, length_s = limit.amount, limit.get_expiry()
        headers = {
            "RateLimit-Policy": f'"{name}";q={quota};w={length_s}',
            "RateLimit": f'"{name}";r={window.remaining};t={wait_s}',
        }
        if not is_allowed:
            detail = f"{quota} {name} in {length_s} s are let through, and {who!r} has made more"
            headers["Retry-After"] = str(wait_s)
            raise HttpProblem(detail, status=429, code="rate_limited", headers=headers)
        added: dict[bytes, bytes] = request.scope["state"][ADDED]
        added |= {key.lower().encode(): value.encode() for key, value in headers.items()}


async def limit_submissions(request: Request) -> None:
    """Count a submission for its owner, or for its address where nobody has a name.

    Raises:
        HttpProblem: 429 ``rate_limited``.
    """
    await request.app.state.rates.take(request, SUBMISSIONS, who=request.state.counted_as)


def _parse(name: str, text: str) -> RateLimitItem:
    try:
        return parse(text)
    except ValueError:
        raise ConfigurationError(
            f"the limit of {name} is {text!r}; write a number and a time, such as 600/minute or 50/second"
        ) from None
