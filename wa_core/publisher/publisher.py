"""Pushes checkpoints to the bucket without the training loop paying for it.

`offer` copies the weights to shared memory and returns; a process of its own uploads them from there and then
commits the checkpoint to the run log (ADR 15). The publisher knows nothing of averages, nor of how the weights
came to be. It keeps two invariants: what was offered is committed in order, or an error says so at the next
`offer` or at `close`; and at most `max_in_flight` snapshots exist at once, in memory that is used again and again,
so memory is bounded however slow the store is.
"""

from __future__ import annotations

import math
import queue
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Self

from pydantic import ValidationError
from torch import Tensor, nn

from wa_core import layout
from wa_core.averaging.schedule_free import CODE, REFUSAL, is_in_train_mode
from wa_core.clock import Clock, SystemClock
from wa_core.errors import InvalidInputError
from wa_core.publisher.snapshot import Snapshot
from wa_core.publisher.uploader import UploaderProcess
from wa_core.publisher.writer import UPLOAD_DEADLINE_S, Assignment, CheckpointWriter, Upload, Writer
from wa_core.records import CheckpointCommitted
from wa_core.store.address import address_of
from wa_core.tensors import canonical_state_dict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType

    from wa_core.store.base import ObjectStore


class CheckpointPublisher:
    """Snapshot, bounded upload by another process, commit.

    Args:
        store: the bucket; one that only this process reaches, such as a `MemoryStore`, is written to by a thread.
        run_id: the run whose checkpoints these are.
        attempt: the attempt that speaks; a newer one fences it. None: the one that the run log is at.
        clock: the time source; with one of your own, a thread writes.
        max_in_flight: how many snapshots may wait for, or be in, upload; each takes the memory of a checkpoint.
        upload_deadline_s: for how long one checkpoint is retried while the store is away.
        around_upload: called with a step; its upload and commit happen inside of what this returns.

    Raises:
        InvalidInputError: `run_id` is no run id, or `max_in_flight` is below 1.

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
        around_upload: Callable[[int], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        if max_in_flight < 1:
            raise InvalidInputError(f"max_in_flight is {max_in_flight}; at least 1 snapshot has to be in flight")
        layout.run_prefix(run_id)  # what is no run id is refused here, not at the first upload
        self._clock = clock or SystemClock()
        self._around_upload = around_upload
        self._snapshots = [Snapshot(f"checkpoint-{number}") for number in range(max_in_flight)]
        self._writer = self._open_writer(store, run_id, attempt=attempt, deadline_s=upload_deadline_s)
        self._free: queue.SimpleQueue[Snapshot] = queue.SimpleQueue()
        for snapshot in self._snapshots:
            self._free.put(snapshot)
        self._queue: queue.SimpleQueue[tuple[Upload, Snapshot] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._is_closed = False
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
                are not the ones to keep (`schedule_free_train_mode`): call ``optimizer.eval()`` first. Or the
                weights or the state cannot be saved, or not be read back, or a number is none; the message says.
            FencedError: a newer attempt has taken over; found out while an earlier checkpoint was uploaded.
            WeightAveragingError: an earlier checkpoint could not be uploaded or committed.
        """
        if is_in_train_mode(trainer_state):
            raise InvalidInputError(f"the checkpoint of step {step} was not taken: {REFUSAL}", code=CODE)
        self._refuse_if_closed()
        waiting_since = self._clock.monotonic()
        snapshot = self._free.get()
        try:
            self._refuse_if_broken()
            stall_s = max(0.0, self._clock.monotonic() - waiting_since)
            state = canonical_state_dict(model.state_dict() if isinstance(model, nn.Module) else model)
            files = snapshot.take(state, trainer_state)
            entry = _entry(
                step=step,
                epoch=epoch,
                lr=lr,
                spec_digest=snapshot.spec_digest,
                metrics={name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)},
                stall_s=stall_s,
                is_last=is_last,
            )
        except BaseException:
            self._free.put(snapshot)
            raise
        self._queue.put((Upload(entry, layout.new_nonce(), files), snapshot))

    def close(self) -> None:
        """Wait until everything offered is committed.

        Raises:
            WeightAveragingError: something offered could not be uploaded or committed.
        """
        if not self._is_closed:
            self._is_closed = True
            self._queue.put(None)
            self._thread.join()
            self._writer.close()
            for snapshot in self._snapshots:
                snapshot.close()
        self._refuse_if_broken()

    def _refuse_if_broken(self) -> None:
        if self._error is not None:
            raise self._error

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise self._error or InvalidInputError("the publisher is closed; offer checkpoints before close()")

    def _open_writer(self, store: ObjectStore, run_id: str, *, attempt: int | None, deadline_s: float) -> Writer:
        address = address_of(store)
        if address is None or not isinstance(self._clock, SystemClock):
            return CheckpointWriter(store, run_id, attempt=attempt, deadline_s=deadline_s, clock=self._clock)
        fds: Sequence[int] = [fd for snapshot in self._snapshots for fd in snapshot.fds]
        return UploaderProcess(Assignment(address, run_id, attempt, deadline_s), fds=fds)

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            upload, snapshot = work
            try:
                if self._error is None:  # a checkpoint after a lost one would hide the loss
                    snapshot.wait()
                    with self._around_upload(upload.entry.step):
                        self._writer.write(upload)
            except Exception as error:  # noqa: BLE001  the thread's outermost loop; offer() and close() raise it
                self._error = error
            finally:
                self._free.put(snapshot)


def _entry(**facts: Any) -> CheckpointCommitted:  # noqa: ANN401  the record's own fields
    try:
        return CheckpointCommitted(files={}, **facts)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise InvalidInputError(
            f"{'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}; steps and epochs are "
            f"whole numbers from 0 on, rates and metrics finite numbers"
        ) from None
