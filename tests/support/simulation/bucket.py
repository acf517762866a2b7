"""The simulated server: a dictionary whose operations are atomic, and an observer that sees every change.

It implements the whole store port, so real code can be run on it directly too. Knows no faults.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING, Protocol

from wa_core.errors import AlreadyExistsError, InvalidInputError, ObjectNotFoundError
from wa_core.store.base import Body, ByteRange, ObjectInfo
from wa_core.store.keys import check_key, roll_up

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from wa_core.clock import Clock


_LAST = chr(0x10FFFF)  # sorts after whatever a key may hold


class Observer(Protocol):
    """Told of every change, after it."""

    def wrote(self, key: str, body: bytes) -> None:
        """An object was written."""
        ...

    def deleted(self, key: str) -> None:
        """An object that was there is gone."""
        ...


class Bucket:
    """One bucket's objects."""

    def __init__(self, clock: Clock, objects: Mapping[str, bytes] | None = None) -> None:
        self.objects = dict(objects or {})
        self._keys = sorted(self.objects)
        self._written_at = dict.fromkeys(self.objects, clock.now())
        self.observer: Observer | None = None
        self._clock = clock

    def get(self, key: str, range: ByteRange | None = None) -> bytes:
        """Read an object or a range of it."""
        body = self._read(key)
        if range is None:
            return body
        if range.start >= len(body):
            raise InvalidInputError(f"{key}: the range starts at {range.start}, beyond its end")
        return body[range.start : range.end]

    def stream(self, key: str, start: int = 0, *, end: int | None = None) -> Iterator[bytes]:
        """Yield an object's bytes."""
        part = self._read(key)[start:end]
        return iter((part,) if part else ())

    def head(self, key: str) -> ObjectInfo:
        """Say an object's size."""
        return ObjectInfo(key, len(self._read(key)), self._written_at[key])

    def put(self, key: str, body: Body) -> None:
        """Write an object."""
        check_key(key)
        data = bytes(body) if isinstance(body, bytes | bytearray | memoryview) else body.read()
        if key not in self.objects:
            insort(self._keys, key)
        self.objects[key] = data
        self._written_at[key] = self._clock.now()
        if self.observer:
            self.observer.wrote(key, data)

    def create(self, key: str, body: bytes) -> None:
        """Write an object if its key is free."""
        if key in self.objects:
            raise AlreadyExistsError(f"{key} exists already")
        self.put(key, body)

    def list(self, prefix: str, start_after: str = "", *, delimiter: str | None = None) -> Iterator[ObjectInfo]:
        """Yield the objects under a prefix, by key."""
        begin, end = bisect_left(self._keys, prefix), bisect_left(self._keys, prefix + _LAST)
        keys = self._keys[begin:end]
        infos = [ObjectInfo(key, len(self.objects[key]), self._written_at[key]) for key in keys]
        return roll_up(infos, prefix=prefix, start_after=start_after, delimiter=delimiter)

    def delete(self, key: str) -> None:
        """Remove an object if it is there."""
        if self.objects.pop(key, None) is None:
            return
        self._keys.remove(key)
        if self.observer:
            self.observer.deleted(key)

    def presign(self, key: str, *, expires_s: int) -> str | None:
        """A simulated server has no URL."""
        return None

    def _read(self, key: str) -> bytes:
        if key not in self.objects:
            raise ObjectNotFoundError(f"no object at {key}")
        return self.objects[key]
