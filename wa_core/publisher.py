"""Pushes checkpoints to the bucket without the training loop paying for it.

`offer` copies the weights to host memory and returns; a background thread serialises, uploads and then commits
the checkpoint to the run log. The publisher knows nothing of averages, nor of how the weights came to be. It
keeps two invariants: what was offered is committed in order, or an error says so at the next `offer` or at
`close`; and at most `max_in_flight` snapshots exist at once, so memory is bounded however slow the store is.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn

from wa_core import layout
from wa_core.averaging.schedule_free import CODE, REFUSAL, is_in_train_mode
from wa_core.catalog.commit import patiently
from wa_core.catalog.files import put_file
from wa_core.catalog.runs import RunLog
from wa_core.clock import Clock, SystemClock
from wa_core.errors import InvalidInputError, StoreUnavailableError, TransientError
from wa_core.records import CheckpointCommitted, FileRef, RunState
from wa_core.specs import spec_digest
from wa_core.tensors import canonical_state_dict, pickled, serialize, spec_of

if TYPE_CHECKING:
    from types import TracebackType

    from wa_core.store.base import ObjectStore

UPLOAD_DEADLINE_S = 600.0

# A run that has failed in between must not come to life again through a late checkpoint of the failed attempt.
_COMMITS_IN = frozenset({RunState.STARTING, RunState.RUNNING, RunState.PAUSING})


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A checkpoint in host memory, on its way to the bucket."""

    entry: CheckpointCommitted
    state: dict[str, Tensor]
    trainer_state: object


class CheckpointPublisher:
    """Snapshot, bounded background upload, commit.

    Args:
        store: the bucket.
        run_id: the run whose checkpoints these are.
        attempt: the attempt that speaks; a newer one fences it. None: the one that the run log is at.
        clock: the time source.
        max_in_flight: how many snapshots may wait for, or be in, upload.
        upload_deadline_s: for how long one checkpoint is retried while the store is away.

    Use it as a context manager, or call `close` in a ``finally``: an exception in the training code then
    loses no checkpoint that was offered before it.
    """

    def __init__(
        self,
        store: ObjectStore,
        run_id: str,
        *,
        attempt: int | None = None,
        clock: Clock | None = None,
        max_in_flight: int = 1,
        upload_deadline_s: float = UPLOAD_DEADLINE_S,
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._attempt = attempt
        self._clock = clock or SystemClock()
        self._deadline_s = upload_deadline_s
        self._log = RunLog(store, run_id, clock=self._clock, patience_s=upload_deadline_s)
        self._slots = threading.Semaphore(max_in_flight)
        self._queue: queue.SimpleQueue[_Snapshot | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint-publisher", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as error:
            if exc is None:
                raise
            # What went wrong in the block comes first; that a checkpoint was lost as well is said with it.
            exc.add_note(f"and the publisher: {error}")

    def offer(
        self,
        step: int,
        model: nn.Module | Mapping[str, Tensor],
        *,
        epoch: int = 0,
        lr: float | None = None,
        metrics: Mapping[str, float] | None = None,
        trainer_state: object = None,
        is_last: bool = False,
    ) -> None:
        """Take a snapshot and have it uploaded; waits first while `max_in_flight` others are under way.

        Args:
            step: training steps done.
            model: a module or its state dict; tensors of any shape, dtype and device.
            epoch: the epoch that the step belongs to.
            lr: the learning rate of the step.
            metrics: numbers to record with the checkpoint; those that are not finite are left out.
            trainer_state: what resuming needs besides the weights (optimizer, scheduler): tensors, numbers,
                strings and None in dicts, lists and tuples, so that ``torch.load(weights_only=True)`` reads it.
            is_last: training ends with this checkpoint.

        Raises:
            InvalidInputError: `trainer_state` is that of a schedule-free optimizer in train mode, whose weights
                are not the ones to keep (`schedule_free_train_mode`); call ``optimizer.eval()`` first.
            FencedError: a newer attempt has taken over; found out while an earlier checkpoint was uploaded.
            WeightAveragingError: an earlier checkpoint could not be uploaded or committed.
        """
        if is_in_train_mode(trainer_state):
            raise InvalidInputError(f"the checkpoint of step {step} was not taken: {REFUSAL}", code=CODE)
        waiting_since = self._clock.monotonic()
        self._slots.acquire()
        try:
            self._refuse_if_broken()
            entry = CheckpointCommitted(
                step=step,
                epoch=epoch,
                lr=lr,
                files={},
                spec_digest="0" * 64,
                metrics={name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)},
                stall_s=max(0.0, self._clock.monotonic() - waiting_since),
                is_last=is_last,
            )
            self._queue.put(_snapshot(entry, model, trainer_state))
        except BaseException:
            self._slots.release()
            raise

    def close(self) -> None:
        """Wait until everything offered is committed.

        Raises:
            WeightAveragingError: something offered could not be uploaded or committed.
        """
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _refuse_if_broken(self) -> None:
        if self._error is not None:
            raise self._error
        if not self._thread.is_alive():
            raise InvalidInputError("the publisher is closed; offer checkpoints before close()")

    def _work(self) -> None:
        while (snapshot := self._queue.get()) is not None:
            try:
                if self._error is None:  # a checkpoint after a lost one would hide the loss
                    self._publish(snapshot)
            except Exception as error:  # noqa: BLE001  the thread's outermost loop; offer() and close() raise it
                self._error = error
            finally:
                del snapshot
                self._slots.release()

    def _publish(self, snapshot: _Snapshot) -> None:
        patiently(self._log.refresh, patience_s=self._deadline_s)
        prefix = layout.checkpoint_prefix(
            self._run_id,
            attempt=self._log.attempt if self._attempt is None else self._attempt,
            step=snapshot.entry.step,
            nonce=layout.new_nonce(),
        )
        bodies = {layout.MODEL_FILE: serialize(snapshot.state)}
        if snapshot.trainer_state is not None:
            bodies[layout.TRAINER_FILE] = pickled(snapshot.trainer_state)
        files = self._upload(prefix, bodies, step=snapshot.entry.step)
        digest = spec_digest(spec_of(snapshot.state))
        entry = snapshot.entry.model_copy(update={"files": files, "spec_digest": digest})
        self._log.append(entry, attempt=self._attempt, expect=_COMMITS_IN if self._attempt else None)

    def _upload(self, prefix: str, bodies: Mapping[str, bytes], *, step: int) -> dict[str, FileRef]:
        deadline = self._clock.monotonic() + self._deadline_s
        try:
            return {
                name: put_file(
                    self._store, prefix + name, body, patience_s=max(1.0, deadline - self._clock.monotonic())
                )
                for name, body in bodies.items()
            }
        except TransientError as error:
            raise StoreUnavailableError(
                f"the checkpoint of step {step} could not be uploaded within {self._deadline_s:.0f} s: "
                f"{error.message}. Bring the store back; training resumes from the last committed checkpoint"
            ) from error


def _snapshot(
    entry: CheckpointCommitted, model: nn.Module | Mapping[str, Tensor], trainer_state: object
) -> _Snapshot:
    state = canonical_state_dict(model.state_dict() if isinstance(model, nn.Module) else model)
    copies: dict[object, Tensor] = {}
    return _Snapshot(entry, _on_host(state, copies=copies), _on_host(trainer_state, copies=copies))


def _on_host(value: Any, *, copies: dict[object, Tensor]) -> Any:  # noqa: ANN401  any nesting of state
    """A copy in host memory that no optimizer step can change; tensors that share memory still do so."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        where = (
            value.device,
            storage.data_ptr(),
            value.storage_offset(),
            value.shape,
            value.stride(),
            value.dtype,
        )
        if where not in copies or not storage.data_ptr():
            copies[where] = value.detach().to("cpu", copy=True)
        return copies[where]
    if isinstance(value, Mapping):
        return {key: _on_host(item, copies=copies) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_on_host(item, copies=copies) for item in value])
    return value
