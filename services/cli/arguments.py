"""Turns what users type after `-c`, `--average`, `--label` and RECIPE into the submission's fields. Pure.

Every refusal is a usage error that names the option and the text.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from typing import TYPE_CHECKING

import typer

from services.recipes.registry import recipe_names
from wa_core.averaging.rules import parse_run_rule
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic import JsonValue

_MAX_NAME = 63
_NAME = re.compile(rf"[a-z0-9][a-z0-9-]{{0,{_MAX_NAME - 1}}}")
_AGE = re.compile(r"(\d{1,6})([smhdw])")
_AGE_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_NO_NAME = re.compile(r"[^a-z0-9]+")


def parse_recipe(text: str, *, is_packaged: bool = False) -> str:
    """The path of a recipe from its path or, unless it comes in a package, its short name, such as ``digits``."""
    if ":" in text:
        return text
    if is_packaged:
        raise _refusal(
            f"'{text}' names no class. Write module:Class, the module as it is imported from the package.",
            place="RECIPE",
        )
    known = {path.partition(":")[0].rpartition(".")[2]: path for path in recipe_names()}
    if text in known:
        return known[text]
    nearest = get_close_matches(text, known, n=1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    raise _refusal(
        f"there is no recipe '{text}'.{hint} Write one of: {', '.join(sorted(known))}; or package.module:Class.",
        place="RECIPE",
    )


def parse_json(text: str, *, place: str) -> JsonValue:
    """A document of JSON."""
    try:
        value: JsonValue = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise _refusal(
            f"this is no JSON: {error.msg} at line {error.lineno}, column {error.colno}.", place=place
        ) from None
    except (ValueError, RecursionError) as error:  # a number that JSON does not have; nesting without an end
        raise _refusal(f"this is no JSON: {error}.", place=place) from None
    return value


def parse_config(items: Sequence[str], *, place: str = "-c") -> dict[str, JsonValue]:
    """``key=value`` settings; a value that is JSON is taken as such, any other as text."""
    config: dict[str, JsonValue] = {}
    for item in items:
        key, value = _pair(item, place=place)
        config[key] = _value(value)
    return config


def parse_labels(items: Sequence[str]) -> dict[str, str]:
    """``key=value`` labels."""
    labels = dict(_pair(item, place="--label") for item in items)
    for key in labels:
        check_name(key, place="--label")
    return labels


def parse_since(text: str, *, now: datetime) -> str:
    """The ISO time of an age before `now`, such as ``30m``, ``2h``, ``7d``, or of a date; UTC if not said."""
    age = _AGE.fullmatch(text)
    try:
        at = now - timedelta(**{_AGE_UNITS[age[2]]: int(age[1])}) if age else datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise _refusal(
            f"{text!r} is neither an age such as 30m, 2h or 7d nor a date such as 2026-11-01.", place="--since"
        ) from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).isoformat(timespec="seconds")


def parse_averages(items: Sequence[str]) -> list[dict[str, str]]:
    """``NAME=RULE`` or ``RULE`` averages; one without a name is called after its rule's kind.

    The part before an equals sign is a name unless it holds a colon: ``mine=ema:half_life=60`` is named,
    ``ema:half_life=60`` is not.
    """
    split = [_split_average(item) for item in items]
    names = [name for name, _ in split if name is not None]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise _refusal(f"two averages are named '{twice[0]}'. Give each its own name.", place="--average")
    averages = []
    for name, rule in split:
        chosen = name or _free_name(rule.partition(":")[0], taken=names)
        names += [] if name else [chosen]
        averages.append({"name": chosen, "rule": rule})
    return averages


def parse_webhooks(urls: Sequence[str], *, events: Sequence[str]) -> list[dict[str, object]]:
    """Each address with what it is told; the service says what it takes."""
    if events and not urls:
        raise _refusal("there is nobody to tell; give an address with --webhook.", place="--webhook-event")
    return [{"url": url, **({"events": list(events)} if events else {})} for url in urls]


def name_of_rule(rule: str) -> str:
    """A name for the average of a rule, such as ``ema-half-life-500`` for ``ema:half_life=500``."""
    try:
        spelling = parse_run_rule(rule).spelling
    except InvalidInputError as error:
        raise _refusal(error.message, place="--rule") from None
    return _NO_NAME.sub("-", spelling)[:_MAX_NAME].strip("-")


def _split_average(item: str) -> tuple[str | None, str]:
    before, equals, after = item.partition("=")
    name, rule = (before, after) if equals and ":" not in before else (None, item)
    if name is not None:
        check_name(name, place="--average")
    try:
        parse_run_rule(rule)
    except InvalidInputError as error:
        raise _refusal(error.message, place="--average") from None
    return name, rule


def _free_name(kind: str, *, taken: list[str]) -> str:
    base = kind.replace("_", "-")
    candidates = [base, *(f"{base}-{number}" for number in range(2, len(taken) + 3))]
    return next(name for name in candidates if name not in taken)


def check_name(name: str, *, place: str) -> None:
    """Refuse what no average can be called."""
    if _NAME.fullmatch(name) is None:
        raise _refusal(
            f"{name!r} is not a name. Names are lower-case letters, digits and hyphens, 63 at most.", place=place
        )


def _pair(item: str, *, place: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals or not key:
        raise _refusal(f"{item!r} has no key or no value. Write key=value.", place=place)
    return key, value


def _value(text: str) -> JsonValue:
    try:
        value: JsonValue = json.loads(text, parse_constant=_no_constant)
    except ValueError:
        return text
    return value


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are not JSON


def _refusal(message: str, *, place: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=f"'{place}'")
