"""A checkpoint as it stood at one step, in memory that is kept and written over by the next.

Weights are copied once, from where they are straight to their place in a safetensors file in shared memory; the
header is made once per architecture. What only resuming needs is written by `torch.save`, straight into shared
memory too. It knows nothing of where the files go. The invariant: once `wait` has returned, the files are what the
arguments of `take` were when it was called, whatever training has done to those since.
"""

from __future__ import annotations

import logging
import pickle
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint
from torch.utils.serialization import config as saving

from wa_core import layout
from wa_core.errors import InvalidInputError
from wa_core.file_layout import FileLayout, find_ties, lay_out
from wa_core.publisher.segment import Segment, address_of
from wa_core.specs import spec_digest
from wa_core.tensors import spec_of

if TYPE_CHECKING:
    import mmap
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

log = logging.getLogger(__name__)

# The record holds a digest of the whole file, so the archive's own checksums, which take longer than the copy,
# are left out; the second is for tensors on a GPU.
_SAVING = {"save.compute_crc32": False, "save.use_pinned_memory_for_d2h": True}

# One processor alone does not use all of the memory's bandwidth; below this, starting a thread takes as long.
_IN_TWO_BYTES = 8 << 20


class Snapshot:
    """Memory for one checkpoint. Not for several threads at once, and to be taken only when nobody reads it."""

    def __init__(self, name: str) -> None:
        self._model = WeightsFile(f"{name}-{layout.MODEL_FILE}")
        self._trainer = Segment(f"{name}-{layout.TRAINER_FILE}")
        self._is_readable = self._has_numpy = False

    @property
    def fds(self) -> tuple[int, ...]:
        """The files, for a process that is to read them."""
        return (self._model.segment.fd, self._trainer.fd)

    @property
    def size_bytes(self) -> int:
        """How much memory is held."""
        return self._model.segment.size_bytes + self._trainer.size_bytes

    @property
    def spec_digest(self) -> str:
        """Of the weights taken last."""
        return self._model.spec_digest

    def take(self, state: Mapping[str, Tensor], trainer_state: object) -> dict[str, Path]:
        """Copy, and return the paths of the files by name; on a GPU the copy may still be under way.

        Raises:
            InvalidInputError: a tensor cannot be in a safetensors file, or `trainer_state` not be pickled, or not
                be read back.
        """
        self._model.fill(state)
        files = {layout.MODEL_FILE: self._model.segment.path}
        if trainer_state is not None:
            self._save(trainer_state)
            files[layout.TRAINER_FILE] = self._trainer.path
        return files

    def wait(self) -> None:
        """Until all of it has been copied."""
        self._model.wait()

    def close(self) -> None:
        """Give the memory back."""
        self._model.close()
        self._trainer.close()

    def _save(self, trainer_state: object) -> None:
        self._write(plain(trainer_state) if self._has_numpy else trainer_state)
        # The first state alone: looking into each would cost a tenth of writing it, and they are all of one kind.
        if not self._is_readable and get_unsafe_globals_in_checkpoint(self._trainer.path):
            self._has_numpy = True
            self._write(plain(trainer_state))
            if unsafe := get_unsafe_globals_in_checkpoint(self._trainer.path):
                raise InvalidInputError(
                    f"trainer_state holds {', '.join(sorted(unsafe))}, and resuming reads only tensors and "
                    f"plain values; offer tensors, numbers and texts in dicts and lists (an array's .tolist())"
                )
        self._is_readable = True

    def _write(self, trainer_state: object) -> None:
        file = self._trainer.rewrite()
        try:
            with saving.patch(_SAVING):  # type: ignore[attr-defined]  # torch adds it when it is imported
                torch.save(trainer_state, cast("BinaryIO", file))
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
            raise InvalidInputError(
                f"trainer_state cannot be saved: {error}; offer tensors, numbers and texts in dicts and lists"
            ) from error
        file.finish()


class WeightsFile:
    """A safetensors file in shared memory, laid out once and filled per checkpoint."""

    def __init__(self, name: str) -> None:
        self.segment = Segment(name)
        self.spec_digest = ""
        self._signature: object = None
        self._memory: mmap.mmap | None = None
        self._views: dict[str, Tensor] = {}
        self._pinned_at = 0
        self._copied: list[torch.cuda.Event] = []

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Copy every tensor to its place."""
        signature = _signature(state)
        if signature != self._signature:
            self._lay_out(state)
            self._signature = signature
        devices = {state[name].device for name in self._views if state[name].is_cuda}
        if devices:
            self._pin()
        self._copy(state, in_two=not devices and self.segment.size_bytes >= _IN_TWO_BYTES)
        # The copies are queued where the weights were computed, so whatever training queues next comes after them.
        # A stream of their own would gain nothing while every later step has to wait for it (ADR 15).
        self._copied = [torch.cuda.current_stream(device).record_event() for device in devices]

    def wait(self) -> None:
        """Until the copies from GPUs have arrived."""
        for event in self._copied:
            event.synchronize()

    def close(self) -> None:
        """Give the memory back."""
        self._forget()
        self.segment.close()

    def _copy(self, state: Mapping[str, Tensor], *, in_two: bool) -> None:
        left = iter(self._views.items())  # whoever is free takes the next one

        def work() -> None:
            with torch.no_grad():
                for name, view in left:
                    view.copy_(state[name], non_blocking=state[name].is_cuda)

        if not in_two or torch.get_num_threads() > 1:  # then torch itself copies in several
            work()
            return
        with ThreadPoolExecutor(1, "checkpoint-copy") as helper:
            helped = helper.submit(work)
            work()
        helped.result()

    def _lay_out(self, state: Mapping[str, Tensor]) -> None:
        file = lay_out(state)
        digest = spec_digest(spec_of(state))
        self._forget()
        self._memory = memory = self.segment.map(file.size_bytes)
        memory[: len(file.head)] = file.head
        self._views = _views(memory, file, state)
        self.spec_digest = digest

    def _pin(self) -> None:
        """Let GPUs write to the memory without the processor's help; what cannot be pinned is only slower."""
        if self._pinned_at or self._memory is None:
            return
        self._pinned_at = address_of(self._memory)
        if int(_cuda().cudaHostRegister(self._pinned_at, len(self._memory), 0)) != 0:
            log.warning("%d bytes of host memory could not be pinned; checkpoints take longer", len(self._memory))

    def _forget(self) -> None:
        if self._pinned_at:
            _cuda().cudaHostUnregister(self._pinned_at)
        self._pinned_at, self._signature, self._memory, self._views = 0, None, None, {}


def plain(state: Any) -> Any:  # noqa: ANN401  whatever is offered
    """The same with Python's numbers for NumPy's, which a schedule that calls NumPy leaves in learning rates."""
    if isinstance(state, np.generic):
        return state.item()
    if type(state) in (dict, OrderedDict):
        return type(state)((key, plain(value)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(plain(value) for value in state)
    return state


def _cuda() -> Any:  # noqa: ANN401  a module of functions
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _signature(state: Mapping[str, Tensor]) -> object:
    return [(name, tensor.dtype, tensor.shape) for name, tensor in state.items()], find_ties(state)


def _views(memory: mmap.mmap, file: FileLayout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors like those of `state`, whose memory is their place in the file."""
    return {
        place.name: torch.frombuffer(
            memory, dtype=(like := state[place.name]).dtype, count=like.numel(), offset=place.begin
        ).reshape(like.shape)
        for place in file.places
        if place.end > place.begin
    }
