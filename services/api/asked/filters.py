"""Reads which runs a list should show from the query of a request. Knows neither the bucket nor the rows."""

import re
from contextlib import suppress
from datetime import datetime
from typing import Annotated

from fastapi import Query as Param
from pydantic import StringConstraints

from services.api.problems import HttpProblem
from services.api.state.index import Query
from wa_core.records import RunState

RUN_ID = r"^[0-7][0-9A-HJKMNP-TV-Z]{25}$"

# RFC 3339, section 5.6; Python alone would also take week dates and times without a zone.
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)

_SEPARATOR = re.compile("[:=]")  # a key has neither

Label = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}[:=]", max_length=320)]
Moment = Annotated[str | None, Param(json_schema_extra={"format": "date-time"}, examples=["2026-11-25T00:00:00Z"])]


async def run_query(
    state: Annotated[list[RunState] | None, Param(description="only runs in this state; may repeat")] = None,
    label: Annotated[
        list[Label] | None,
        Param(
            description="only runs with this `key:value`, or `key=value`; may repeat", examples=[["team:vision"]]
        ),
    ] = None,
    owner: Annotated[
        str | None, Param(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="only this owner's")
    ] = None,
    created_after: Moment = None,
    created_before: Moment = None,
) -> Query:
    """Which runs a list should show: those submitted at or after `created_after`, and before `created_before`."""
    return Query(
        states=frozenset(state or ()),
        labels=frozenset(_label(text) for text in label or ()),
        owner=owner,
        created_after=_moment(created_after, name="created_after"),
        created_before=_moment(created_before, name="created_before"),
    )


def _label(text: str) -> tuple[str, str]:
    key, value = _SEPARATOR.split(text, maxsplit=1)
    return key, value


def _moment(text: str | None, *, name: str) -> datetime | None:
    if text is None:
        return None
    if _MOMENT.fullmatch(text):
        with suppress(ValueError):
            return datetime.fromisoformat(text.upper())
    message = f"{text[:100]!r} is no time as RFC 3339 writes it; write 2026-11-25T08:30:00Z (and + as %2B)"
    pointer = f"query.{name}"
    raise HttpProblem(f"{pointer}: {message}", status=422, code="invalid_request", faults=[(pointer, message)])
