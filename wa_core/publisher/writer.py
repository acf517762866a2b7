"""Writes one checkpoint to the bucket: its files, and then the log entry that makes it one.

Whoever holds the files' memory runs this: the uploader's process, or a thread of the trainer where the store
cannot be opened elsewhere. It knows no torch. The invariant: an entry is committed after all its files, by an
attempt that no newer one has fenced; writing the same upload again, even from another process, commits it once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from wa_core import layout
from wa_core.catalog.commit import patiently
from wa_core.catalog.files import put_path
from wa_core.catalog.runs import RunLog
from wa_core.clock import SystemClock
from wa_core.errors import StoreUnavailableError, TransientError
from wa_core.records import CheckpointCommitted, FileRef, RunState

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from wa_core.clock import Clock
    from wa_core.store.address import StoreAddress
    from wa_core.store.base import ObjectStore

UPLOAD_DEADLINE_S = 600.0

# A run that has failed in between must not come to life again through a late checkpoint of the failed attempt.
_COMMITS_IN = frozenset({RunState.STARTING, RunState.RUNNING, RunState.PAUSING})


@dataclass(frozen=True, slots=True)
class Upload:
    """A checkpoint on its way: the entry to commit, but for `files`, and where the bytes of each file are.

    The entry's `write_id` and the `nonce` are chosen before the first try, so that another try is the same write.
    """

    entry: CheckpointCommitted
    nonce: str
    files: Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class Assignment:
    """What another process needs to write a run's checkpoints: where to, whose, and for how long to try."""

    address: StoreAddress
    run_id: str
    attempt: int | None
    deadline_s: float


class Writer(Protocol):
    """Takes uploads, one after the other."""

    def write(self, upload: Upload) -> None:
        """Upload and commit; return once that is done.

        Raises:
            FencedError: a newer attempt has taken over.
            TransientError: the store stayed away for too long, or the process that uploads was lost.
            WeightAveragingError: as the error says.
        """
        ...

    def close(self) -> None:
        """Let go of what it needs for writing."""
        ...


class CheckpointWriter:
    """Writes from this very process.

    Args:
        store: the bucket.
        run_id: whose checkpoints.
        attempt: on whose behalf; None: the attempt that the log is at.
        clock: dates the entries and measures the deadline.
        deadline_s: for how long one checkpoint is tried while the store is away.
    """

    def __init__(
        self,
        store: ObjectStore,
        run_id: str,
        *,
        attempt: int | None,
        deadline_s: float,
        clock: Clock | None = None,
    ) -> None:
        self._store = store
        self._attempt = attempt
        self._clock = clock or SystemClock()
        self._deadline_s = deadline_s
        self._log = RunLog(store, run_id, clock=self._clock, patience_s=deadline_s)

    def write(self, upload: Upload) -> None:
        """See `Writer`."""
        patiently(self._log.refresh, patience_s=self._deadline_s)
        prefix = layout.checkpoint_prefix(
            self._log.run_id,
            attempt=self._log.attempt if self._attempt is None else self._attempt,
            step=upload.entry.step,
            nonce=upload.nonce,
        )
        files = self._put(prefix, upload)
        entry = upload.entry.model_copy(update={"files": files})
        self._log.append(entry, attempt=self._attempt, expect=_COMMITS_IN if self._attempt else None)

    def close(self) -> None:
        """Nothing is held."""

    def _put(self, prefix: str, upload: Upload) -> dict[str, FileRef]:
        deadline = self._clock.monotonic() + self._deadline_s
        try:
            return {
                name: put_path(
                    self._store, prefix + name, path, patience_s=max(1.0, deadline - self._clock.monotonic())
                )
                for name, path in upload.files.items()
            }
        except TransientError as error:
            step, deadline_s = upload.entry.step, self._deadline_s
            raise StoreUnavailableError(
                f"the checkpoint of step {step} could not be uploaded within {deadline_s:.0f} s: {error.message}. "
                f"Bring the store back; training resumes from the last committed checkpoint"
            ) from error
