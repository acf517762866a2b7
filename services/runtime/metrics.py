"""What every process tells Prometheus: its version, and how its store answers. No label names a run or a key."""

from __future__ import annotations

from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, Counter, Histogram, Info

from wa_core.errors import ConflictError, InvalidInputError, NotFoundError, WeightAveragingError
from wa_core.records import FORMAT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import CollectorRegistry

    from wa_core.store.base import Body, ByteRange, ObjectInfo, ObjectStore

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ANSWERS = (NotFoundError, ConflictError, InvalidInputError)  # the store does what it should


def tell_build(service: str, *, registry: CollectorRegistry = REGISTRY) -> None:
    """Say which version this is, once in a process or registry."""
    told = {"service": service, "version": version("weight-averaging"), "format": str(FORMAT)}
    about = "The version of this process, and of the bucket format it speaks."
    Info("wa_build", about, registry=registry).info(told)


class StoreMetrics:
    """The time series of one process's calls to its store."""

    def __init__(self, *, registry: CollectorRegistry = REGISTRY) -> None:
        self._seconds = Histogram(
            "wa_store_operation_seconds",
            "Seconds that a call to the object store took, failed ones too; of a stream, until it was open.",
            ["operation"],
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self._errors = Counter(
            "wa_store_errors",
            "Calls to the object store that failed: it was away, refused the credentials, or broke off.",
            ["operation", "kind"],
            registry=registry,
        )

    @contextmanager
    def observed(self, operation: str) -> Iterator[None]:
        """Time one call, and count the fault with which it ends."""
        with self._seconds.labels(operation).time(), self.counted(operation):
            yield

    @contextmanager
    def counted(self, operation: str) -> Iterator[None]:
        """Count the fault, if any; that an object is not there, or is there already, is an answer."""
        try:
            yield
        except _ANSWERS:
            raise
        except WeightAveragingError as error:
            self._errors.labels(operation, error.kind).inc()
            raise


class MeteredStore:
    """`store`, with every call timed. See `ObjectStore` for the methods."""

    def __init__(self, store: ObjectStore, metrics: StoreMetrics) -> None:
        self._store = store
        self._metrics = metrics

    def get(self, key: str, range: ByteRange | None = None) -> bytes:
        """Read an object."""
        with self._metrics.observed("get"):
            return self._store.get(key, range=range)

    def stream(self, key: str, start: int = 0, *, end: int | None = None) -> Iterator[bytes]:
        """Open an object; faults on the way count as well."""
        with self._metrics.observed("stream"):
            chunks = self._store.stream(key, start=start, end=end)
        return self._counted(chunks)

    def head(self, key: str) -> ObjectInfo:
        """Say an object's size and time."""
        with self._metrics.observed("head"):
            return self._store.head(key)

    def put(self, key: str, body: Body) -> None:
        """Write an object."""
        with self._metrics.observed("put"):
            self._store.put(key, body)

    def create(self, key: str, body: bytes) -> None:
        """Write an object if its key is free."""
        with self._metrics.observed("create"):
            self._store.create(key, body)

    def list(self, prefix: str, start_after: str = "", *, delimiter: str | None = None) -> Iterator[ObjectInfo]:
        """The objects under a prefix."""
        with self._metrics.observed("list"):
            return self._store.list(prefix, start_after=start_after, delimiter=delimiter)

    def delete(self, key: str) -> None:
        """Remove an object."""
        with self._metrics.observed("delete"):
            self._store.delete(key)

    def presign(self, key: str, *, expires_s: int) -> str | None:
        """A URL that reads the object, if the store has such; no call to the store."""
        return self._store.presign(key, expires_s=expires_s)

    def _counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        with self._metrics.counted("stream"):
            yield from chunks
