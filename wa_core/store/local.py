"""Objects as files under one folder: for tests, offline use and a bucket on a shared disk.

A key's slashes are subfolders. Writes go to a temporary file first and become visible whole, by `link` (which
refuses a taken name, so exactly one creator wins) or by `rename` (which replaces). An acknowledged write survives
SIGKILL; it is not forced to disk, so a power cut may lose it.
"""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from wa_core.errors import AlreadyExistsError, InvalidInputError, ObjectNotFoundError, StoreUnavailableError
from wa_core.store.base import Body, ByteRange, ObjectInfo
from wa_core.store.keys import check_key, roll_up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

CHUNK_BYTES = 1 << 20
TEMPORARY = ".tmp"


class LocalStore:
    """One bucket in a folder; its methods and their errors are those of `ObjectStore`.

    Args:
        root: the folder, which is made if it is missing.

    Raises:
        StoreUnavailableError: it cannot be made.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        with _translated(str(root)):
            (self.root / TEMPORARY).mkdir(parents=True, exist_ok=True)

    def get(self, key: str, range: ByteRange | None = None) -> bytes:
        """Read an object or a range of it."""
        wanted = range or ByteRange(0)
        with self._open(key) as file, _translated(key):
            size = os.fstat(file.fileno()).st_size
            if range is not None and wanted.start >= size:
                raise InvalidInputError(f"{key}: range starts at {wanted.start}, but it has {size} bytes")
            file.seek(wanted.start)
            return file.read(-1 if wanted.end is None else wanted.end - wanted.start)

    def stream(self, key: str, start: int = 0, *, end: int | None = None) -> Iterator[bytes]:
        """Yield an object's bytes in chunks."""
        return _chunks(self._open(key), ByteRange(start, end))

    def head(self, key: str) -> ObjectInfo:
        """Say an object's size and time."""
        with _translated(key):
            path = self._path(key)
            if path.is_dir():
                raise ObjectNotFoundError(f"no object at {key}")
            return _info(key, path.stat())

    def put(self, key: str, body: Body) -> None:
        """Write an object, replacing any before it."""
        path = self._path(key)
        start = None if isinstance(body, bytes | bytearray | memoryview) or not body.seekable() else body.tell()
        try:
            with _translated_write(key), self._temporary(body) as temporary:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.replace(path)
        except StoreUnavailableError:
            if start is not None:
                body.seek(start)  # type: ignore[union-attr]  # only files have a start
            raise

    def create(self, key: str, body: bytes) -> None:
        """Write an object if its key is free."""
        path = self._path(key)
        with _translated_write(key), self._temporary(body) as temporary:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise AlreadyExistsError(f"{key} exists already") from None

    def list(self, prefix: str, start_after: str = "", *, delimiter: str | None = None) -> Iterator[ObjectInfo]:
        """Yield the objects under a prefix, by key."""
        folder = prefix.rpartition("/")[0]
        try:
            start = self._path(folder) if folder else self.root
        except InvalidInputError:
            return iter(())  # no key looks like this
        shallow_from = len(prefix) if delimiter == "/" else None
        found = _walk(start, f"{folder}/" if folder else "", prefix, start_after, shallow_from)
        return roll_up(found, prefix=prefix, start_after=start_after, delimiter=delimiter)

    def delete(self, key: str) -> None:
        """Remove an object if it is there."""
        try:
            with _translated(key):
                self._path(key).unlink(missing_ok=True)
        except ObjectNotFoundError:
            return

    def presign(self, key: str, *, expires_s: int) -> str | None:  # noqa: ARG002  a folder has no URL
        """A folder has no URL."""
        return None

    def _path(self, key: str) -> Path:
        if check_key(key).partition("/")[0] == TEMPORARY:
            raise InvalidInputError(f"{key!r} cannot be a key: the folder {TEMPORARY!r} holds unfinished writes")
        return self.root / key

    def _open(self, key: str) -> BinaryIO:
        with _translated(key):
            return self._path(key).open("rb")

    @contextmanager
    def _temporary(self, body: Body) -> Iterator[Path]:
        path = self.root / TEMPORARY / uuid4().hex
        try:
            with path.open("xb") as file:
                if isinstance(body, bytes | bytearray | memoryview):
                    file.write(body)
                else:
                    shutil.copyfileobj(body, file, CHUNK_BYTES)
            yield path
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ObjectNotFoundError(f"no object at {key}") from None
    except OSError as error:
        why = error.strerror or str(error)
        raise StoreUnavailableError(f"{key}: {why}; check the disk and its permissions") from error


@contextmanager
def _translated_write(key: str) -> Iterator[None]:
    with _translated(key):
        try:
            yield
        except (FileExistsError, IsADirectoryError, NotADirectoryError):
            raise InvalidInputError(
                f"{key} cannot be written: another key is in the way; no key may be another's folder"
            ) from None
        except FileNotFoundError as error:
            raise StoreUnavailableError(f"{key}: {error.filename} is gone; check the disk") from error


def _chunks(file: BinaryIO, wanted: ByteRange) -> Iterator[bytes]:
    with file, _translated(file.name):
        file.seek(wanted.start)
        left = None if wanted.end is None else wanted.end - wanted.start
        while chunk := file.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left)):
            left = None if left is None else left - len(chunk)
            yield chunk


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))


def _walk(
    folder: Path, base: str, prefix: str, start_after: str, shallow_from: int | None
) -> Iterator[ObjectInfo]:
    """The files under `folder`, by key; with `shallow_from`, one file stands for each folder after the prefix."""
    for key, entry in _sorted_entries(folder, base):
        if key.endswith("/"):
            is_wanted = key.startswith(prefix) or prefix.startswith(key)
            if not is_wanted or (key < start_after and not start_after.startswith(key)):
                continue
            below = _walk(folder / entry.name, key, prefix, start_after, shallow_from)
            if shallow_from is not None and len(key) > shallow_from:
                below = iter([first] if (first := next(below, None)) else [])
            yield from below
        elif key.startswith(prefix) and key > start_after:
            try:
                yield _info(key, entry.stat())
            except FileNotFoundError:
                continue  # deleted while we looked


def _sorted_entries(folder: Path, base: str) -> list[tuple[str, os.DirEntry[str]]]:
    try:
        with os.scandir(folder) as entries:
            named = [
                (base + entry.name + ("/" if entry.is_dir() else ""), entry)
                for entry in entries
                if base or entry.name != TEMPORARY
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(named, key=lambda pair: pair[0])
