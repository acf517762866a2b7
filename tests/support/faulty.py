"""A store that fails on purpose: scripted, by chance from a seed, or wholly away."""

from __future__ import annotations

import io
import random
import threading
import time
from collections import defaultdict
from contextlib import suppress
from enum import StrEnum
from typing import TYPE_CHECKING, TypeVar

from wa_core.errors import StoreUnavailableError, WeightAveragingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from wa_core.store.base import Body, ByteRange, ObjectInfo, ObjectStore

T = TypeVar("T")


class Fault(StrEnum):
    """What can go wrong with one call."""

    DROP_REQUEST = "drop_request"
    """It never arrives: nothing happens, and the caller hears `StoreUnavailableError`."""
    DROP_RESPONSE = "drop_response"
    """It happens, and the caller hears `StoreUnavailableError`."""
    DUPLICATE = "duplicate"
    """It arrives twice; the caller hears the second answer."""
    DELAY = "delay"
    """It takes `delay_s` longer."""
    TRUNCATE = "truncate"
    """A read ends half-way: `stream` breaks, `get` fails."""
    FLIP_BIT = "flip_bit"
    """A read has one bit changed."""
    IGNORE_CONDITION = "ignore_condition"
    """A create overwrites."""


class FaultyStore:
    """Wraps a store; what `next_call` scripts comes first, then chance by `rates`.

    Args:
        inner: the store that does the work.
        rates: how likely each fault is, for every call that it can befall.
        seed: decides the chances; the same seed and calls give the same faults.
        delay_s: how long a delay is.
        operations: the operations that chance may hit; None for all.
    """

    def __init__(
        self,
        inner: ObjectStore,
        *,
        rates: Mapping[Fault, float] | None = None,
        seed: int = 0,
        delay_s: float = 0.01,
        operations: frozenset[str] | None = None,
    ) -> None:
        self.inner = inner
        self.rates = dict(rates or {})
        self.is_away = False
        self.calls: list[tuple[str, str]] = []
        self.faults: list[tuple[str, str, Fault]] = []
        self._operations = operations
        self._delay_s = delay_s
        self._random = random.Random(seed)
        self._script: dict[str, list[Fault]] = defaultdict(list)
        self._lock = threading.Lock()

    def next_call(self, operation: str, *faults: Fault) -> None:
        """Let the next calls of `operation` (such as ``create``) fail so, one fault each."""
        with self._lock:
            self._script[operation].extend(faults)

    def get(self, key: str, range: ByteRange | None = None) -> bytes:
        """Read, unless a fault comes in between."""
        fault = self._draw("get", key)
        body = self._call(fault, lambda: self.inner.get(key, range=range))
        if fault is Fault.TRUNCATE:
            raise StoreUnavailableError(f"get {key}: the answer was cut (on purpose)")
        return self._flipped(body) if fault is Fault.FLIP_BIT else body

    def stream(self, key: str, start: int = 0, *, end: int | None = None) -> Iterator[bytes]:
        """Stream, unless a fault comes in between."""
        fault = self._draw("stream", key)
        chunks = self._call(fault, lambda: self.inner.stream(key, start=start, end=end))
        return self._spoiled(key, chunks, fault)

    def head(self, key: str) -> ObjectInfo:
        """Look, unless a fault comes in between."""
        return self._call(self._draw("head", key), lambda: self.inner.head(key))

    def put(self, key: str, body: Body) -> None:
        """Write, unless a fault comes in between; a file is set back when it fails."""
        fault = self._draw("put", key)
        data = body if isinstance(body, bytes | bytearray | memoryview) else body.read()
        try:
            self._call(fault, lambda: self.inner.put(key, data))
        except StoreUnavailableError:
            if not isinstance(body, bytes | bytearray | memoryview):
                body.seek(-len(data), io.SEEK_CUR)
            raise

    def create(self, key: str, body: bytes) -> None:
        """Create, unless a fault comes in between."""
        fault = self._draw("create", key)
        if fault is Fault.IGNORE_CONDITION:
            self.inner.put(key, body)
            return
        self._call(fault, lambda: self.inner.create(key, body))

    def list(self, prefix: str, start_after: str = "", *, delimiter: str | None = None) -> Iterator[ObjectInfo]:
        """List, unless a fault comes in between."""
        fault = self._draw("list", prefix)
        return self._call(fault, lambda: self.inner.list(prefix, start_after=start_after, delimiter=delimiter))

    def delete(self, key: str) -> None:
        """Remove, unless a fault comes in between."""
        self._call(self._draw("delete", key), lambda: self.inner.delete(key))

    def presign(self, key: str, *, expires_s: int) -> str | None:
        """Presigning asks no server, so nothing goes wrong."""
        return self.inner.presign(key, expires_s=expires_s)

    def _draw(self, operation: str, key: str) -> Fault | None:
        with self._lock:
            self.calls.append((operation, key))
            if self.is_away:
                return Fault.DROP_REQUEST
            fault = self._script[operation].pop(0) if self._script[operation] else self._by_chance(operation)
            if fault is not None:
                self.faults.append((operation, key, fault))
            return fault

    def _by_chance(self, operation: str) -> Fault | None:
        drawn = self._random.random()
        if self._operations is not None and operation not in self._operations:
            return None
        for fault, rate in self.rates.items():
            if drawn < rate:
                return fault
            drawn -= rate
        return None

    def _call(self, fault: Fault | None, call: Callable[[], T]) -> T:
        if fault is Fault.DROP_REQUEST:
            raise StoreUnavailableError("the request was lost (on purpose)")
        if fault is Fault.DELAY:
            time.sleep(self._delay_s)
        if fault is Fault.DUPLICATE:
            call()
        if fault is not Fault.DROP_RESPONSE:
            return call()
        with suppress(WeightAveragingError):  # whatever the answer was, nobody hears it
            call()
        raise StoreUnavailableError("the response was lost (on purpose)")

    def _spoiled(self, key: str, chunks: Iterator[bytes], fault: Fault | None) -> Iterator[bytes]:
        for chunk in chunks:
            if fault is Fault.TRUNCATE:
                yield chunk[: len(chunk) // 2]
                raise StoreUnavailableError(f"{key}: the connection ended early (on purpose)")
            yield self._flipped(chunk) if fault is Fault.FLIP_BIT else chunk
            fault = None if fault is Fault.FLIP_BIT else fault

    def _flipped(self, body: bytes) -> bytes:
        if not body:
            return body
        with self._lock:
            at = self._random.randrange(len(body) * 8)
        spoiled = bytearray(body)
        spoiled[at // 8] ^= 1 << (at % 8)
        return bytes(spoiled)


class CrashAfter(FaultyStore):
    """Dies for good after some operations."""

    def __init__(self, inner: ObjectStore, num_operations: int) -> None:
        super().__init__(inner)
        self._left = num_operations

    def _draw(self, operation: str, key: str) -> Fault | None:
        self.is_away = self._left == 0
        self._left -= not self.is_away
        return super()._draw(operation, key)
