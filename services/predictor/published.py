"""Published weights as the predictor finds them: what a generation is of, and its file, on disk and verified.

It knows the bucket and a folder; no model and no process. The invariant: a path that it gives holds the very bytes
that the record names; anything else is never handed on.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wa_core import layout
from wa_core.catalog.averages import Generations
from wa_core.catalog.runs import fetch_spec
from wa_core.errors import AverageNotFoundError, CorruptError, RunNotFoundError

if TYPE_CHECKING:
    from pathlib import Path

    from wa_core.records import FileRef, RunRequest
    from wa_core.store.base import ObjectStore

_MAX_KNOWN = 1024


@dataclass(frozen=True, slots=True)
class Target:
    """One generation of an average: whose answers are wanted."""

    run_id: str
    average: str
    generation: int
    file: FileRef
    request: RunRequest

    @property
    def key(self) -> str:
        """Of the model: of the same run and the same bytes there is one."""
        return f"{self.run_id}-{self.file.sha256}"


class Published:
    """Finds generations in `store`, and keeps those it has found: they never change. For several threads."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._known: OrderedDict[tuple[str, str, int], Target] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, run_id: str, average: str, generation: int) -> Target:
        """A published generation.

        Raises:
            NotFoundError: there is no such run, or nothing is served of such a generation.
            TransientError: the store is away.
        """
        place = run_id, average, generation
        with self._lock:
            if place in self._known:
                self._known.move_to_end(place)
                return self._known[place]
        found = self._read(*place)
        with self._lock:
            self._known[place] = found
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        return found

    def _read(self, run_id: str, average: str, generation: int) -> Target:
        if not layout.is_run_id(run_id):
            raise RunNotFoundError(f"there is no run {run_id[:100]!r}")
        record = Generations(self._store, run_id, average).fetch_assessment(generation)
        if record is None or layout.MODEL_FILE not in record.files:
            raise AverageNotFoundError(
                f"nothing is published of generation {generation} of average {average!r} of run {run_id}"
            )
        request = fetch_spec(self._store, run_id).request
        return Target(run_id, average, generation, file=record.files[layout.MODEL_FILE], request=request)


class ModelFiles:
    """Weights on disk, as many of the last used as fit into `max_bytes`. For several threads."""

    def __init__(self, store: ObjectStore, folder: Path, *, max_bytes: int) -> None:
        self._store = store
        self._folder = folder
        self._max_bytes = max_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._fetching: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()

    def path_of(self, file: FileRef) -> Path:
        """Where a file's bytes are, fetched if need be. Others may push it out; who has it open keeps it.

        Raises:
            CorruptError: the bucket holds other bytes than the record names.
            NotFoundError: it was cleaned away.
            TransientError: the store is away.
            OSError: the disk is full.
        """
        path = self._folder / f"{file.sha256}.safetensors"
        with self._lock:
            fetching = self._fetching[file.sha256]
        with fetching:  # the same file is fetched once, others side by side
            if not path.exists():
                _fetch(self._store, file, path)
            self._use(file)
        return path

    def _use(self, file: FileRef) -> None:
        with self._lock:
            self._sizes[file.sha256] = file.size_bytes
            self._sizes.move_to_end(file.sha256)
            while sum(self._sizes.values()) > self._max_bytes and len(self._sizes) > 1:
                oldest, _ = self._sizes.popitem(last=False)
                self._fetching.pop(oldest, None)
                (self._folder / f"{oldest}.safetensors").unlink(missing_ok=True)


def _fetch(store: ObjectStore, file: FileRef, path: Path) -> None:
    part = path.with_suffix(f".{layout.new_nonce()}")
    digest, size_bytes = hashlib.sha256(), 0
    try:
        with part.open("wb") as written:
            for chunk in store.stream(file.key):
                digest.update(chunk)
                size_bytes += written.write(chunk)
        if (size_bytes, digest.hexdigest()) != (file.size_bytes, file.sha256):
            raise CorruptError(f"{file.key} holds other bytes than its record names; run `wa verify`")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
