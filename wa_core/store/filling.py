"""Reading an object into memory that is there, without a copy where the store can.

It knows the port and what a store may add to it; no server. The invariant: what is counted is in place, so that a
read which breaks off can go on behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.store.base import ObjectStore


def fill(store: ObjectStore, key: str, out: memoryview, *, start: int = 0) -> Iterator[int]:
    """Put an object's bytes from `start` on into `out`; yields, again and again, how many have been added.

    Fewer bytes than `out` has room for are no error. A store may have a method of this name and form, without the
    argument `store`; what comes from any other is copied out of its stream.

    Raises:
        ObjectNotFoundError, StoreUnavailableError: as for `ObjectStore.stream`.
    """
    # Asked of the class: a wrapper that passes on what it does not know would be read past.
    if hasattr(type(store), "fill"):
        return cast("Iterator[int]", cast("Any", store).fill(key, out, start=start))
    return _copied(store.stream(key, start=start, end=start + len(out)), out)


def _copied(chunks: Iterator[bytes], out: memoryview) -> Iterator[int]:
    filled = 0
    for chunk in chunks:
        out[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
        yield len(chunk)
