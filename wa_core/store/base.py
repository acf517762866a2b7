"""The object store port: eight methods, and what each promises.

Every adapter passes the same contract tests. Keys are plain strings; their meaning lives in `wa_core.layout`.
`create` is the only operation that decides races: the first writer of a key wins, for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Protocol, runtime_checkable

from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

Body = bytes | bytearray | memoryview | BinaryIO


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a listing or a HEAD says of one object.

    With a `delimiter`, a listing also yields common prefixes: their `key` ends with the delimiter,
    `size_bytes` is 0 and `modified_at` is None.
    """

    key: str
    size_bytes: int
    modified_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes `start` up to, not including, `end` (None: to the end of the object).

    Raises:
        InvalidInputError: `start` is negative or `end` lies before it.
    """

    start: int
    end: int | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.end is not None and self.end < self.start):
            raise InvalidInputError(f"bytes {self.start} to {self.end} are no range; 0 <= start <= end must hold")


class ObjectStore(Protocol):
    """Synchronous access to one bucket. Methods may be called from several threads.

    A key is what `wa_core.store.keys.check_key` lets through, and no key may be another's folder (``a`` beside
    ``a/b``): stores backed by files cannot hold both.

    Every method raises `StoreUnavailableError` when the store is away or overloaded and `StoreAuthError`
    when it refuses the credentials.
    """

    def get(self, key: str, range: ByteRange | None = None) -> bytes:
        """Read an object, or the part of it inside `range`, into memory.

        Raises:
            ObjectNotFoundError: no object has this key.
            InvalidInputError: the range starts at or after the object's end.
        """
        ...

    def stream(self, key: str, start: int = 0, *, end: int | None = None) -> Iterator[bytes]:
        """Yield an object's bytes from `start` up to `end` (exclusive; None: its end) in order, in chunks.

        The object is opened on the call, so a missing key raises before anything is yielded. Starting at or
        after its end yields nothing.

        Raises:
            ObjectNotFoundError: no object has this key.
            StoreUnavailableError: the connection broke on the way; the bytes so far are sound.
        """
        ...

    def head(self, key: str) -> ObjectInfo:
        """Say an object's size and time.

        Raises:
            ObjectNotFoundError: no object has this key.
        """
        ...

    def put(self, key: str, body: Body) -> None:
        """Write an object, replacing any before it; a reader sees the old one or the new one, whole.

        A file is read from where it stands to its end and stays open; when the write fails it is set back to
        where it stood, if it can be, so that trying again sends all of it.
        """
        ...

    def create(self, key: str, body: bytes) -> None:
        """Write an object if, and only if, its key is free. Never retried inside the adapter.

        Raises:
            AlreadyExistsError: the key is taken; by another writer, or by an earlier try of this very call
                whose response was lost (`wa_core.catalog.commit` tells the two apart).
        """
        ...

    def list(self, prefix: str, start_after: str = "", *, delimiter: str | None = None) -> Iterator[ObjectInfo]:
        """Yield every object whose key starts with `prefix` and sorts after `start_after`, by key.

        With a `delimiter`, keys that hold it after the prefix are rolled up into their common prefix; some
        stores show a common prefix for a while after its last object was deleted.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove an object; removing one that is not there is no error."""
        ...

    def presign(self, key: str, *, expires_s: int) -> str | None:
        """A URL that reads the object without credentials for `expires_s` seconds, or None if it has none."""
        ...


@runtime_checkable
class ReachableStore(Protocol):
    """A store whose objects this process may also ask for by HTTP."""

    def nearby_url(self, key: str, *, expires_s: int) -> str:
        """A URL as `ObjectStore.presign` makes it, at the address that this process uses itself."""
        ...
