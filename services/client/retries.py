"""When a request is sent again, and after how long. Pure but for the clock: it sends nothing.

Waits double, with jitter, so that clients of a service that comes back do not come all at once; a `Retry-After` is
kept to. What cannot succeed within the caller's patience is raised at once.
"""

from __future__ import annotations

import random
import time

from services.client.errors import ApiError, ServiceUnreachableError

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 2.0
_CONFLICT = 409
_PASSING = {429, 502, 503, 504}

Trouble = ServiceUnreachableError | ApiError
#: To be caught where something may be tried again.
TROUBLE = (ServiceUnreachableError, ApiError)


class Patience:
    """How long something is still tried.

    Args:
        patience_s: seconds from now until which it is; 0 tries once.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self.renew()

    def renew(self) -> None:
        """Begin anew: something has been achieved."""
        self._deadline = time.monotonic() + self._patience_s
        self._wait_s = _FIRST_WAIT_S

    def wait_s_after(self, error: Trouble) -> float:
        """Seconds to wait before the next try.

        Raises:
            ServiceUnreachableError: `error`, after which trying again makes no sense.
            ApiError: likewise.
        """
        wait_s = self._wait_s * random.uniform(0.5, 1.0)  # noqa: S311  jitter, no secret
        if isinstance(error, ApiError) and error.retry_after_s is not None:
            wait_s = max(wait_s, error.retry_after_s)
        if not is_passing(error) or time.monotonic() + wait_s > self._deadline:
            raise error
        self._wait_s = min(self._wait_s * 2, _LONGEST_WAIT_S)
        return wait_s


def is_passing(error: Trouble) -> bool:
    """Whether the same request may well succeed a little later."""
    if isinstance(error, ServiceUnreachableError):
        return True
    # A conflict that says when to come back is a request of the same key that is still being answered.
    return error.status in _PASSING or (error.status == _CONFLICT and error.retry_after_s is not None)
