"""Turns the functions of `services.client.calls` and `services.client.scripts` into methods of a client.

The methods keep name, parameters, types and docstring, so neither client writes any of them again.
"""

from __future__ import annotations

import inspect
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from services.client.calls import Call
    from services.client.scripts import Script

P = ParamSpec("P")
T = TypeVar("T")


def sends(make: Callable[P, Call[T]]) -> Callable[Concatenate[Any, P], T]:
    """A method that sends the call that `make` makes."""
    return _method(make, "send")


def plays(write: Callable[P, Script[T]]) -> Callable[Concatenate[Any, P], Iterator[T]]:
    """A method that plays the script that `write` writes."""
    return _method(write, "play")


def asends(make: Callable[P, Call[T]]) -> Callable[Concatenate[Any, P], Awaitable[T]]:
    """`sends` for a client whose caller awaits."""
    return _method(make, "send")


def aplays(write: Callable[P, Script[T]]) -> Callable[Concatenate[Any, P], AsyncIterator[T]]:
    """`plays` for a client whose caller awaits."""
    return _method(write, "play")


def _method(make: Callable[..., Any], verb: str) -> Callable[..., Any]:
    @wraps(make)
    def method(client: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  typed by those above
        return getattr(client, verb)(make(*args, **kwargs))

    # What `help` shows: the parameters are those of the function, after the client itself.
    client = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    signature = inspect.signature(make)
    del method.__wrapped__
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]  # read by `inspect`
        parameters=[client, *signature.parameters.values()], return_annotation=inspect.Signature.empty
    )
    return method
