"""The id of a request: the caller's, if it is one that may stand in a log, or one made here.

It is a context variable, so every log line of the request says it, and so does every problem document.
"""

from __future__ import annotations

import random
import re
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from collections.abc import Iterable

HEADER = b"x-request-id"

# No secret; asking the system for each would let other threads in, and the loop wait for its turn to go on.
_draw = random.Random()  # noqa: S311

_SANE = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The caller's id, or a new one when there is none, more than one, or one that is not plain and short."""
    sent = [value for name, value in headers if name == HEADER]
    if len(sent) == 1 and _SANE.fullmatch(sent[0]):
        return sent[0].decode()
    return f"{_draw.getrandbits(128):032x}"


def current_request_id() -> str | None:
    """The id of the request that is being answered, or None outside of one."""
    found = structlog.contextvars.get_contextvars().get("request_id")
    return found if isinstance(found, str) else None
