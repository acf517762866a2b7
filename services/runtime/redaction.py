"""Keeps secrets out of a log, whoever puts them into an event: the last step before a line is written.

It looks at whole lines, so tracebacks and the messages of libraries are covered as well. Two ways: the process's
own secrets, wherever they stand, and what looks like a secret of anybody's.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from pydantic import BaseModel, SecretStr

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from structlog.typing import EventDict, Processor, WrappedLogger

REDACTED = "[redacted]"

_MIN_CHARS = 6

_FORMS = (
    (re.compile(r"(wa_[0-9a-f]{16}_)[0-9a-f]+"), rf"\1{REDACTED}"),  # our tokens; the id may be known
    (re.compile(r"\b((?:Bearer|Basic) +)[\w.~+/=-]+", re.IGNORECASE), rf"\1{REDACTED}"),
    (re.compile(r"(wa_session=)[\w=-]+"), rf"\1{REDACTED}"),
    # Presigned URLs: whoever has the signature may read.
    (re.compile(r"(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s\"'\\]+"), rf"\1{REDACTED}"),
    (re.compile(r"([?&]Signature=)[^&\s\"'\\]+"), rf"\1{REDACTED}"),
    (re.compile(r"(://[^/\s:@\"']+:)[^@/\s\"']+(?=@)"), rf"\1{REDACTED}"),  # a password in an address
)


def redacting(secrets: Iterable[str] = ()) -> Processor:
    """A processor that goes behind the renderer, and takes out `secrets` and whatever looks like one."""
    ours = sorted({form for secret in secrets for form in _spellings(secret)}, key=len, reverse=True)

    def redact(_logger: WrappedLogger, _method: str, rendered: EventDict | str) -> str:
        line = str(rendered)
        for secret in ours:
            line = line.replace(secret, REDACTED)
        for form, replacement in _FORMS:
            line = form.sub(replacement, line)
        return line

    return redact


def _spellings(secret: str) -> list[str]:
    """A secret as text, in JSON and in Python; none for one that is found in too many other words."""
    return [secret, json.dumps(secret)[1:-1], repr(secret)[1:-1]] if len(secret) >= _MIN_CHARS else []


def secrets_in(settings: BaseModel) -> Iterator[str]:
    """Every secret that settings hold, also those in a table."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        for one in value.values() if isinstance(value, dict) else [value]:
            if isinstance(one, SecretStr):
                yield one.get_secret_value()
