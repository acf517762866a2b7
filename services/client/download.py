"""Downloads that resume and prove themselves.

A file arrives as ``PATH.part``. Beside it ``PATH.part.etag`` says which content the part belongs to, so a cut
download goes on with ``Range`` and ``If-Range``, and starts over when the content has been replaced. `PATH`
appears by an atomic rename, after the sha256 of every byte has matched the service's ``Repr-Digest``.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from services.client.errors import ApiError, ServiceUnreachableError
from services.client.transport import is_passing
from wa_core.errors import CorruptError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx2

    from services.client.transport import Query, Transport

_NUM_TRIES = 8
_PARTIAL = 206
_UNSATISFIABLE = 416


def fetch_file(
    transport: Transport,
    url_path: str,
    path: str | Path,
    *,
    query: Query | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Download `url_path` to `path`; see the module's docstring for how.

    Raises:
        CorruptError: the digest did not match, twice in a row.
        InvalidInputError: `path` cannot be written.
        ServiceUnreachableError: the connection broke more often than is worth trying.
        ApiError: the service refuses.
    """
    part = _Part(Path(path))
    part.check_writable()
    num_mismatches = 0
    for num_try in range(1, _NUM_TRIES + 1):
        try:
            digest = _fetch_rest(transport, url_path, part, query=query, on_progress=on_progress)
        except (ServiceUnreachableError, ApiError) as error:
            if not is_passing(error) or num_try == _NUM_TRIES:
                raise
            time.sleep(min(0.1 * 2**num_try, 2.0))
            continue
        if digest is not None and part.sha256() == digest:
            return part.finish()
        part.discard()
        num_mismatches += digest is not None
        if num_mismatches > 1:
            break
    raise CorruptError(
        f"{url_path}: what arrived twice does not match the service's sha256; nothing was written to {path}"
    )


def check_writable(path: str | Path) -> None:
    """Fail before long work, rather than after, when a download to `path` could not be written.

    Raises:
        InvalidInputError: as `fetch_file`.
    """
    _Part(Path(path)).check_writable()


def _fetch_rest(
    transport: Transport,
    url_path: str,
    part: _Part,
    *,
    query: Query | None,
    on_progress: Callable[[int, int], None] | None,
) -> str | None:
    """Append what is missing; the sha256 the whole must have, or None when the part turned out useless."""
    headers = {"Accept-Encoding": "identity"}
    size, etag = part.size_bytes(), part.etag()
    if size and etag:
        headers |= {"Range": f"bytes={size}-", "If-Range": etag}
    with transport.stream(url_path, query=query, headers=headers) as response:
        if response.status_code == _UNSATISFIABLE:
            # The part is as long as the whole, or longer: only its digest can tell.
            return _unquoted(etag) if response.headers.get("Content-Range") == f"bytes */{size}" else None
        if response.status_code != _PARTIAL:
            part.begin(response.headers.get("ETag", ""))
            size = 0
        total = size + int(response.headers.get("Content-Length", 0))
        with part.appending() as file:
            for chunk in response.iter_raw():
                file.write(chunk)
                size += len(chunk)
                if on_progress is not None:
                    on_progress(size, total)
        return _promised_sha256(response)


def _promised_sha256(response: httpx2.Response) -> str:
    found = re.search(r"sha-256=:([A-Za-z0-9+/=]+):", response.headers.get("Repr-Digest", ""))
    if found:
        return base64.b64decode(found.group(1)).hex()
    return _unquoted(response.headers.get("ETag", ""))


def _unquoted(etag: str) -> str:
    return etag.strip('"')


class _Part:
    """The partial file beside the target, and the ETag of what it is a part of."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self._path = target.with_name(target.name + ".part")
        self._etag_path = target.with_name(target.name + ".part.etag")

    def check_writable(self) -> None:
        """Fail before anything is downloaded rather than after."""
        if self.target.is_dir():
            raise InvalidInputError(f"{self.target} is a folder; name a file to write")
        with self._faults_named():
            self._path.open("ab").close()

    def size_bytes(self) -> int:
        """How much is there."""
        return self._path.stat().st_size if self._path.exists() else 0

    def etag(self) -> str:
        """The ETag of what is there, or an empty string when that is not known."""
        return self._etag_path.read_text() if self._etag_path.exists() else ""

    def begin(self, etag: str) -> None:
        """Empty the part; what comes next belongs to `etag`."""
        with self._faults_named():
            # Emptied first: a crash in between leaves an empty part, never one with the wrong ETag.
            self._path.write_bytes(b"")
            self._etag_path.write_text(etag)

    @contextmanager
    def appending(self) -> Iterator[BinaryIO]:
        """The part, open for more."""
        with self._faults_named(), self._path.open("ab") as file:
            yield file

    def sha256(self) -> str:
        """The digest of all that is there, in hexadecimal."""
        with self._path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def discard(self) -> None:
        """Forget what is there."""
        self._path.unlink(missing_ok=True)
        self._etag_path.unlink(missing_ok=True)

    def finish(self) -> Path:
        """Let the whole file appear."""
        with self._faults_named():
            self._path.replace(self.target)
        self._etag_path.unlink(missing_ok=True)
        return self.target

    @contextmanager
    def _faults_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InvalidInputError(
                f"cannot write {self.target}: {error.strerror or error}; choose another place with -o",
                code="output_not_writable",
            ) from None
