"""The port to tracing: what a span is, and what begins one.

It knows no library. The invariant: a `traceparent` is all that one process hands to another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    Attributes = Mapping[str, str | int | float | bool]


class Span(Protocol):
    """A piece of work under way."""

    @property
    def traceparent(self) -> str | None:
        """What work that grows from it names as its parent."""
        ...

    def note(self, attributes: Attributes) -> None:
        """Say more about it."""
        ...

    def rename(self, name: str) -> None:
        """Give it another name."""
        ...

    def end(self, *, error: str = "") -> None:
        """It is over; with `error`, badly."""
        ...


class Tracer(Protocol):
    """Where spans go."""

    def begin(self, name: str, *, parent: str | None, attributes: Attributes) -> Span:
        """Begin a span below `parent`, a `traceparent`; None begins a trace."""
        ...

    def close(self) -> None:
        """Send what is waiting; takes seconds at most."""
        ...
