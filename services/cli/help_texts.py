"""How help shows a command: flags without a type, numbers as N, and paragraphs that the terminal breaks.

Mixed into Typer's classes, which show `<bool>` beside every flag and keep the line breaks of a docstring.
"""

from __future__ import annotations

import inspect
from typing import Any

from typer.core import TyperGroup, TyperOption

_NUMBERS = ("<int", "<float")


class ReadableHelp:
    """What a command or a group of commands shows of itself."""

    def __init__(self, *, help: str | None = None, **options: Any) -> None:  # noqa: A002, ANN401
        super().__init__(help=_unwrapped(help), **options)  # type: ignore[call-arg]

    def get_params(self, ctx: Any) -> list[Any]:  # noqa: ANN401  Typer does not publish its types
        """The parameters, with what stands for an option's value."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if isinstance(param, TyperOption) and param.metavar is None:
                param.metavar = _value_of(param, ctx)
        return params


class ReadableGroup(ReadableHelp, TyperGroup):
    """A group of commands."""


def _value_of(option: TyperOption, ctx: Any) -> str | None:  # noqa: ANN401
    if option.is_flag:
        return ""
    shown = option.display_type(ctx)
    if shown.startswith(_NUMBERS):
        return "N"
    return "TEXT" if shown == "<str>" else None


def _unwrapped(text: str | None) -> str | None:
    """Paragraphs as one line each, but for those that are indented: those are code."""
    if text is None:
        return None
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(each if "\n " in each else each.replace("\n", " ") for each in paragraphs)
