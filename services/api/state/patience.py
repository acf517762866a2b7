"""A store that gives up within seconds, because a caller of the API is waiting.

The processes that hold work wait minutes for a store that is away. The API holds none: it tries briefly, says 503
and Retry-After, and lets the caller decide. To keep `wa_core.catalog.commit.patiently` from waiting on, what is
raised here is no `TransientError`.

A store that accepts connections and never answers would hold an adapter for minutes, so every call runs in another
thread, which is left behind at the deadline and, being a daemon, cannot keep the process from ending.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from services.api.problems import RETRY_AFTER_S, HttpProblem
from wa_core.catalog.commit import patiently
from wa_core.errors import TransientError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from wa_core.store.base import Body, ByteRange, ObjectInfo, ObjectStore

T = TypeVar("T")

PATIENCE_S = 1.5
DEADLINE_S = 5.0
MAX_CALLS = 64
_IDLE_S = 10.0
MAX_FRUITLESS_READS = 3  # in a row: a store that opens an object and then gives none of it


class StoreAwayError(HttpProblem):
    """The store did not answer in the time that a caller should wait."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the object store is away: {reason}",
            status=503,
            code="storage_unavailable",
            headers={"Retry-After": str(RETRY_AFTER_S)},
        )


class _Callers:
    """Threads that make calls, kept a while for the next ones: starting one takes as long as a quick call.

    `concurrent.futures` has the same, but its threads keep the process from ending.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._idle = threading.Semaphore(0)

    def submit(self, call: Callable[[], None]) -> None:
        """Let a thread that has nothing to do make a call, or a new one."""
        self._calls.put(call)
        if not self._idle.acquire(blocking=False):
            threading.Thread(target=self._work, name="store-call", daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                call = self._calls.get(timeout=_IDLE_S)
            except Empty:
                if self._idle.acquire(blocking=False):
                    return
                continue  # a call is on its way
            call()
            self._idle.release()


class BriefStore:
    """`store`, with every call tried again for `PATIENCE_S` seconds. See `ObjectStore` for the methods.

    No call takes longer than `deadline_s`, and at most `MAX_CALLS` are under way at once. A create is tried again
    like the rest: its records carry a `write_id`, so a lost response is recognised.
    """

    def __init__(self, store: ObjectStore, *, deadline_s: float = DEADLINE_S) -> None:
        self._store = store
        self._deadline_s = deadline_s
        self._slots = threading.BoundedSemaphore(MAX_CALLS)
        self._callers = _Callers()

    def get(self, key: str, range: ByteRange | None = None) -> bytes:
        """Read an object."""
        return self._briefly(lambda: self._store.get(key, range=range))

    def stream(self, key: str, start: int = 0, *, end: int | None = None) -> Iterator[bytes]:
        """Open an object; a connection that breaks on the way is opened again where it broke."""
        chunks = self._briefly(lambda: self._store.stream(key, start=start, end=end))
        return self._resuming(chunks, key, start=start, end=end)

    def head(self, key: str) -> ObjectInfo:
        """Say an object's size and time."""
        return self._briefly(lambda: self._store.head(key))

    def put(self, key: str, body: Body) -> None:
        """Write an object."""
        self._briefly(lambda: self._store.put(key, body))

    def create(self, key: str, body: bytes) -> None:
        """Write an object if its key is free."""
        self._briefly(lambda: self._store.create(key, body))

    def list(self, prefix: str, start_after: str = "", *, delimiter: str | None = None) -> Iterator[ObjectInfo]:
        """The objects under a prefix, listed whole before the first is yielded."""
        return iter(
            self._briefly(lambda: [*self._store.list(prefix, start_after=start_after, delimiter=delimiter)])
        )

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._briefly(lambda: self._store.delete(key))

    def presign(self, key: str, *, expires_s: int) -> str | None:
        """A URL that reads the object, if the store has such."""
        return self._store.presign(key, expires_s=expires_s)

    def _briefly(self, call: Callable[[], T]) -> T:
        if not self._slots.acquire(timeout=self._deadline_s):
            raise StoreAwayError(f"all {MAX_CALLS} calls to it are waiting for an answer")
        answer: Future[T] = Future()
        self._callers.submit(partial(self._call, call, answer))
        try:
            return answer.result(self._deadline_s)
        except TransientError as error:
            raise StoreAwayError(error.message) from None
        except TimeoutError:
            raise StoreAwayError(f"no answer within {self._deadline_s:g} s") from None

    def _call(self, call: Callable[[], T], answer: Future[T]) -> None:
        try:
            answer.set_result(patiently(call, patience_s=PATIENCE_S))
        except BaseException as error:  # noqa: BLE001  whatever it is, it belongs to the caller's thread
            answer.set_exception(error)
        finally:
            self._slots.release()

    def _resuming(self, chunks: Iterator[bytes], key: str, *, start: int, end: int | None) -> Iterator[bytes]:
        position, num_fruitless = start, 0
        while True:
            resumed_at = position
            try:
                for chunk in chunks:
                    position += len(chunk)
                    yield chunk
            except TransientError as error:
                num_fruitless = num_fruitless + 1 if position == resumed_at else 0
                if num_fruitless == MAX_FRUITLESS_READS:
                    raise StoreAwayError(error.message) from None
                chunks = self._briefly(partial(self._store.stream, key, start=position, end=end))
            else:
                return
