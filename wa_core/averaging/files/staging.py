"""Work in progress beside an output: a folder that a killed merge leaves behind and the next one goes on from.

It knows files and byte ranges; no tensors, rules or formats. The invariant: `has` is true only for bytes that were
written before they were noted, by the same job (sources, rule, options), since the machine was started, and only
one process at a time holds the folder. What a killed process has written, the system still has; what it had not
put on the disk before a power cut is gone, in any order, so nothing from before a start is believed (ADR 9).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from wa_core.errors import ConflictError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_JOB, _JOURNAL = "job.json", "journal.jsonl"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Staging:
    """The folder `.NAME.part` beside the output NAME.

    Args:
        output: what is being made; its folder must exist and be writable.
        job: everything that decides the output's bytes; work on another job is thrown away.
        boot: which start of the machine this is; work from before it is thrown away. None: the system is asked.
        note_every_s: how often what is written is recorded; a kill costs the work since.

    Raises:
        InvalidInputError: `output_not_writable`.
        ConflictError: another process is at work on the same output.
    """

    def __init__(
        self, output: Path, *, job: Sequence[object], boot: str | None = None, note_every_s: float = 0.5
    ) -> None:
        self.output = output
        self.folder = output.with_name(f".{output.name}.part")
        self._mutex = threading.Lock()
        self._pending: list[tuple[str, int, int]] = []
        self._done: dict[str, list[tuple[int, int]]] = {}
        self._note_every_s = note_every_s
        self._next_note_at = 0.0
        self._lock = -1
        try:
            self.folder.mkdir(exist_ok=True)
            self._take_lock()
            self._load(hashlib.sha256(json.dumps([*job, boot or _this_boot()]).encode()).hexdigest())
        except OSError as error:
            self.close()
            raise unwritable(output, error) from error
        except BaseException:
            self.close()
            raise

    @property
    def is_resumed(self) -> bool:
        """Whether a killed merge has left work that counts."""
        return bool(self._done)

    def forget(self, names: Iterable[str]) -> None:
        """What was noted of these tensors does not hold: the file they were in is gone."""
        for name in names:
            self._done.pop(name, None)

    def has(self, name: str, begin: int, end: int) -> bool:
        """Whether a merge before this one has finished these bytes of a tensor."""
        return any(first <= begin and end <= last for first, last in self._done.get(name, ()))

    def note(self, name: str, begin: int, end: int) -> None:
        """Say that these bytes are written; from time to time, what was said is recorded.

        Raises:
            InvalidInputError: `output_not_writable`.
        """
        with self._mutex:
            self._pending.append((name, begin, end))
            if time.monotonic() < self._next_note_at:
                return
            try:
                with (self.folder / _JOURNAL).open("a") as journal:
                    journal.write("".join(json.dumps(entry) + "\n" for entry in self._pending))
            except OSError as error:
                raise unwritable(self.output, error) from error
            self._pending.clear()
            self._next_note_at = time.monotonic() + self._note_every_s

    def remove(self) -> None:
        """Throw the folder away."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Let go of the folder and keep it."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConflictError(
                f"another process is writing {self.output} at this moment; wait for it, or choose another output"
            ) from None

    def _load(self, job: str) -> None:
        noted = self.folder / _JOB
        if noted.exists() and noted.read_text() == job:
            self._done = _read_journal(self.folder / _JOURNAL)
            return
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        noted.write_text(job)


def unwritable(output: Path, error: OSError) -> InvalidInputError:
    """The error for an output that cannot be written, now or any more."""
    return InvalidInputError(
        f"{output} cannot be written: {error.strerror or error}; free the space, or choose another place with -o",
        code="output_not_writable",
    )


def _this_boot() -> str:
    """A text that is another one after every start of the machine."""
    try:
        return _BOOT.read_text()
    except OSError:  # a system that does not tell: no work is gone on from
        return secrets.token_hex(16)


def _read_journal(path: Path) -> dict[str, list[tuple[int, int]]]:
    done: dict[str, list[tuple[int, int]]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            name, begin, end = json.loads(line)
        except ValueError:
            continue  # cut by a kill; the next process has written on behind it
        done.setdefault(str(name), []).append((int(begin), int(end)))
    return {name: _merged(ranges) for name, ranges in done.items()}


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found
