"""The grammar of a rule's spelling, ``name`` or ``name:key=value,key=value``: reading it and writing it.

It knows the form, not the rules: which names and options exist is told to it. The invariant: whatever the text,
reading ends in values of plain Python types or in an `InvalidInputError` of one line that shows what to write.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Mapping

_NUMBER = re.compile(r"[+-]?([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a rule: the field it sets, what its text must be, and a value to show in messages."""

    field: str
    kind: Literal["number", "whole", "word"]
    example: str

    def read(self, text: str, key: str, raw: str) -> float | int | str:
        """The value of ``key=raw`` within `text`.

        Raises:
            InvalidInputError: `raw` is not of this option's kind.
        """
        if self.kind == "number" and not _NUMBER.fullmatch(raw):
            raise InvalidInputError(
                f"{text!r}: {key} must be a plain number, not {raw!r}; write {key}={self.example}, without quotes "
                f"or spaces"
            )
        if self.kind == "whole" and not _INTEGER.fullmatch(raw):
            raise InvalidInputError(
                f"{text!r}: {key} must be a whole number, not {raw!r}; write {key}={self.example}"
            )
        if not raw:
            raise InvalidInputError(f"{text!r}: {key} has no value; write {key}={self.example}")
        return float(raw) if self.kind == "number" else int(raw) if self.kind == "whole" else raw


def read_options(text: str, rest: str, *, known: Mapping[str, Option]) -> dict[str, float | int | str]:
    """The values of ``key=value,key=value`` (`rest`, a part of `text`), by field.

    Raises:
        InvalidInputError: an option is not `known`, is given twice, or its value is not of its kind.
    """
    values: dict[str, float | int | str] = {}
    for option in rest.split(","):
        key, _, raw = option.partition("=")
        if key not in known:
            takes = ", ".join(f"{name}=…" for name in known)
            hint = did_you_mean(key, known)
            raise InvalidInputError(f"{text!r}: there is no option {key!r}{hint}; this rule takes {takes}")
        if known[key].field in values:
            raise InvalidInputError(f"{text!r}: {key} is given twice; give it once")
        values[known[key].field] = known[key].read(text, key, raw)
    return values


def spell(name: str, options: Mapping[str, float | str | None]) -> str:
    """The text that reads back as these options; those that are None are left out."""
    shown = [f"{key}={_spell_value(value)}" for key, value in options.items() if value is not None]
    return f"{name}:{','.join(shown)}" if shown else name


def did_you_mean(word: str, known: Mapping[str, object]) -> str:
    """A hint at the nearest known word, or nothing."""
    close = difflib.get_close_matches(word.strip().lower(), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _spell_value(value: float | str) -> str:
    return repr(float(value)).removesuffix(".0") if isinstance(value, float) else str(value)
