"""The reference store: a dictionary behind a lock. What it does is what the port means."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from wa_core.errors import AlreadyExistsError, InvalidInputError, ObjectNotFoundError
from wa_core.store.base import Body, ByteRange, ObjectInfo
from wa_core.store.keys import check_key, roll_up

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK_BYTES = 1 << 20


class MemoryStore:
    """Objects in this process's memory, gone with it; methods and errors are those of `ObjectStore`."""

    def __init__(self) -> None:
        self._objects: dict[str, tuple[bytes, datetime]] = {}
        self._lock = threading.Lock()

    def get(self, key: str, range: ByteRange | None = None) -> bytes:
        """Read an object or a range of it."""
        body = self._read(key)
        if range is None:
            return body
        if range.start >= len(body):
            raise InvalidInputError(f"{key}: range starts at {range.start}, but it has {len(body)} bytes")
        return body[range.start : range.end]

    def stream(self, key: str, start: int = 0, *, end: int | None = None) -> Iterator[bytes]:
        """Yield an object's bytes in chunks."""
        body = memoryview(self._read(key))[start:end]
        return (bytes(body[at : at + CHUNK_BYTES]) for at in range(0, len(body), CHUNK_BYTES))

    def head(self, key: str) -> ObjectInfo:
        """Say an object's size and time."""
        with self._lock:
            if key not in self._objects:
                raise ObjectNotFoundError(f"no object at {key}")
            body, modified_at = self._objects[key]
        return ObjectInfo(key, len(body), modified_at)

    def put(self, key: str, body: Body) -> None:
        """Write an object, replacing any before it."""
        check_key(key)
        data = bytes(body) if isinstance(body, bytes | bytearray | memoryview) else body.read()
        with self._lock:
            self._objects[key] = (data, datetime.now(UTC))

    def create(self, key: str, body: bytes) -> None:
        """Write an object if its key is free."""
        check_key(key)
        with self._lock:
            if key in self._objects:
                raise AlreadyExistsError(f"{key} exists already")
            self._objects[key] = (body, datetime.now(UTC))

    def list(self, prefix: str, start_after: str = "", *, delimiter: str | None = None) -> Iterator[ObjectInfo]:
        """Yield the objects under a prefix, by key."""
        with self._lock:
            found = [
                ObjectInfo(key, len(body), modified_at)
                for key, (body, modified_at) in sorted(self._objects.items())
                if key.startswith(prefix)
            ]
        return roll_up(found, prefix=prefix, start_after=start_after, delimiter=delimiter)

    def delete(self, key: str) -> None:
        """Remove an object if it is there."""
        with self._lock:
            self._objects.pop(key, None)

    def presign(self, key: str, *, expires_s: int) -> str | None:  # noqa: ARG002  memory has no URL
        """Memory has no URL."""
        return None

    def _read(self, key: str) -> bytes:
        with self._lock:
            if key not in self._objects:
                raise ObjectNotFoundError(f"no object at {key}")
            return self._objects[key][0]
