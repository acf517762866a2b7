"""What tests of the averager share: a scripted assessor, a counting and a crashing store, oracles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from services.averager.assessor import Outcome
from services.averager.worker import Averager
from wa_core.catalog.averages import Generations
from wa_core.clock import ManualClock
from wa_core.records import BatchNormSummary
from wa_core.tensors import read_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wa_core.records import RunRequest
    from wa_core.store.base import ObjectStore


class ScriptedAssessor:
    """Answers at once with fixed metrics and no buffers; or with the outcome it was told to give."""

    def __init__(self, outcome: Outcome | None = None) -> None:
        self.num_jobs = 0
        self._outcome = outcome or Outcome(
            BatchNormSummary(status="skipped"), raw={"loss": 2.0}, before={"loss": 1.5}, after={"loss": 1.0}
        )

    def assess(
        self, request: RunRequest, *, raw: Mapping[str, torch.Tensor] | None, weights: Mapping[str, object]
    ) -> dict[str, Outcome]:
        """The scripted outcome, for every average."""
        self.num_jobs += 1
        return dict.fromkeys(weights, self._outcome)


class Crash(BaseException):
    """The process is gone: nothing may catch it, and nothing in memory survives it."""


class WatchedStore:
    """Counts reads by key and, when told to, crashes right after its n-th operation (as SIGKILL would)."""

    def __init__(self, inner: ObjectStore, *, crash_after: int | None = None) -> None:
        self.num_operations = 0
        self.bytes_read: dict[str, int] = {}
        self._inner = inner
        self._crash_after = crash_after

    def stream(self, key: str, *, start: int = 0, end: int | None = None) -> Any:
        """Count what is read of each key."""
        self._count()
        chunks = list(self._inner.stream(key, start=start, end=end))
        self.bytes_read[key] = self.bytes_read.get(key, 0) + sum(map(len, chunks))
        return iter(chunks)

    def list(self, prefix: str, *, start_after: str = "", delimiter: str | None = None) -> Any:
        """List, then count."""
        found = list(self._inner.list(prefix, start_after=start_after, delimiter=delimiter))
        self._count()
        return iter(found)

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._inner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            try:
                return operation(*args, **kwargs)
            finally:
                self._count()

        return counted

    def _count(self) -> None:
        self.num_operations += 1
        if self._crash_after is not None and self.num_operations > self._crash_after:
            raise Crash


def averager(store: ObjectStore, *, assessor: Any = None) -> Averager:
    """An averager as the process would build it, with time in the test's hands."""
    return Averager(store, clock=ManualClock(), assessor=assessor or ScriptedAssessor())


def run_until_idle(worker: Averager, *, max_ticks: int = 500) -> None:
    """Tick until there is nothing to do."""
    for _ in range(max_ticks):
        if not worker.tick():
            return
    raise AssertionError(f"still busy after {max_ticks} ticks")


def served_weights(store: ObjectStore, run_id: str, name: str) -> dict[str, torch.Tensor]:
    """What a user would download of the newest generation."""
    manifest = Generations(store, run_id, name).newest()
    assert manifest is not None
    ref = manifest.files["model.safetensors"]
    return read_checkpoint(store.stream(ref.key), size_bytes=ref.size_bytes, sha256=ref.sha256).tensors


def exact_mean(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Brute-force float64 mean of the float tensors of `states`."""
    floats = [name for name, tensor in states[0].items() if tensor.is_floating_point()]
    return {name: torch.stack([state[name].double() for state in states]).mean(0) for name in floats}


def same_bits(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal to the last bit, names, types and shapes included."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )
