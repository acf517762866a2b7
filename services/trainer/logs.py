"""The log text of one rank, shipped to the bucket in batches: what the recipe prints, and what training says.

It captures what Python code writes to stdout and stderr, and passes it on to where it went before. Memory is
bounded: while the store is away the oldest text is dropped, and a line says so.
"""

from __future__ import annotations

import contextlib
import io
import threading
from typing import TYPE_CHECKING, TextIO

from wa_core import layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.clock import Clock
    from wa_core.store.base import ObjectStore

MAX_WAITING_CHARS = 1 << 20
_DROPPED = "[older log lines were dropped while the store was away]\n"


class LogShipper:
    """Collects text and writes it as numbered parts under the rank's log folder."""

    def __init__(self, store: ObjectStore, run_id: str, *, attempt: int, rank: int | str, clock: Clock) -> None:
        self._store = store
        self._run_id = run_id
        self._attempt = attempt
        self._rank = rank
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting = ""
        self._next_part = 1

    def write(self, text: str) -> None:
        """Add text as it is."""
        with self._lock:
            self._waiting += text
            if len(self._waiting) > MAX_WAITING_CHARS:
                self._waiting = _DROPPED + self._waiting[-MAX_WAITING_CHARS // 2 :]

    def line(self, text: str) -> None:
        """Add a line of our own, with the time."""
        self.write(f"{self._clock.now():%H:%M:%S} {text}\n")

    def flush(self) -> None:
        """Write what waits as one part; on failure it keeps waiting.

        Raises:
            TransientError: the store is away.
        """
        with self._lock:
            text, self._waiting = self._waiting, ""
        if not text:
            return
        key = layout.logs_part(self._run_id, attempt=self._attempt, rank=self._rank, part=self._next_part)
        try:
            self._store.put(key, text.encode(errors="replace"))
        except BaseException:
            with self._lock:
                self._waiting = text + self._waiting
            raise
        self._next_part += 1

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Also take what this process prints, until the block is left."""
        import sys

        with (
            contextlib.redirect_stdout(_Tee(sys.stdout, self)),
            contextlib.redirect_stderr(_Tee(sys.stderr, self)),
        ):
            yield


class _Tee(io.TextIOBase):
    """Writes to a stream and to a shipper."""

    def __init__(self, stream: TextIO, shipper: LogShipper) -> None:
        self._stream = stream
        self._shipper = shipper

    def write(self, text: str) -> int:
        self._shipper.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return False
