"""Downloads that resume and prove themselves.

A file arrives as ``PATH.part``. Beside it ``PATH.part.etag`` says which content the part belongs to, so a cut
download goes on with ``Range`` and ``If-Range``, and starts over when the content has been replaced. `PATH`
appears by an atomic rename, after the sha256 of every byte has matched the service's ``Repr-Digest``. No more
than one piece is in memory.

A download begins at the store's own address, where the service names one: it is faster, and costs the service
nothing (ADR 0034). Whatever goes wrong there, the service itself sends the rest.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from services.client.calls import Call
from services.client.errors import ApiError
from services.client.exchange import RANGE_NOT_SATISFIABLE
from services.client.retries import TROUBLE, Patience
from wa_core.errors import CorruptError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx2

    from services.client.calls import Query
    from services.client.retries import Trouble
    from services.client.transport import AsyncTransport, Transport

_LEAST_PATIENCE_S = 10.0
_PARTIAL = 206
_MAX_MISMATCHES = 2
_NOT_WRITABLE = "output_not_writable"
_ETAG = re.compile(r'"[!-~]+"')


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
        CorruptError: the digest did not match, twice.
        InvalidInputError: `path` cannot be written.
        ServiceUnreachableError: the connection broke, and nothing came for as long as is worth trying.
        ApiError: the service refuses.
    """
    download = Download(url_path, path, query=query, on_progress=on_progress)
    patience = Patience(max(transport.patience_s, _LEAST_PATIENCE_S))
    while True:
        size = download.size_bytes
        try:
            with transport.stream(download.call()) as response, download.receiving(response) as take:
                for piece in response.iter_raw():
                    take(piece)
        except TROUBLE as error:
            if download.turns_to_service(error):
                continue
            if download.size_bytes > size:
                patience.renew()
            time.sleep(patience.wait_s_after(error))
            continue
        if download.is_finished():
            return download.target


async def fetch_file_async(
    transport: AsyncTransport,
    url_path: str,
    path: str | Path,
    *,
    query: Query | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Path:
    """`fetch_file` for tasks; the digest is worked out in a thread."""
    download = Download(url_path, path, query=query, on_progress=on_progress)
    patience = Patience(max(transport.patience_s, _LEAST_PATIENCE_S))
    while True:
        size = download.size_bytes
        try:
            async with transport.stream(download.call()) as response:
                with download.receiving(response) as take:
                    async for piece in response.aiter_raw():
                        take(piece)
        except TROUBLE as error:
            if download.turns_to_service(error):
                continue
            if download.size_bytes > size:
                patience.renew()
            await asyncio.sleep(patience.wait_s_after(error))
            continue
        if await asyncio.to_thread(download.is_finished):
            return download.target


def check_writable(path: str | Path) -> None:
    """Fail before long work, rather than after, when a download to `path` could not be written.

    Raises:
        InvalidInputError: as `fetch_file`.
    """
    _Part(Path(path)).check_writable()


class Download:
    """One download, without the waiting: what to ask for next, and what to do with what comes.

    Raises:
        InvalidInputError: the target cannot be written.
    """

    def __init__(
        self,
        url_path: str,
        path: str | Path,
        *,
        query: Query | None,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._part = _Part(Path(path))
        self._part.check_writable()
        self._url_path = url_path
        self._query = query or {}
        self._on_progress = on_progress
        self._digest: str | None = None
        self._num_mismatches = 0
        self._may_ask_store = True
        self._asked_store = False

    @property
    def target(self) -> Path:
        """The file that is to be."""
        return self._part.target

    @property
    def size_bytes(self) -> int:
        """How much of it is there."""
        return self._part.size_bytes()

    def call(self) -> Call[Any]:
        """Asks for what is missing."""
        headers = {"Accept-Encoding": "identity"}
        size, etag = self._part.size_bytes(), self._part.etag()
        if size and etag:
            headers |= {"Range": f"bytes={size}-", "If-Range": etag}
        # The store knows nothing of our ETags, so it cannot tell whether a part still belongs to what it has.
        self._asked_store = self._may_ask_store and not size
        query = {**self._query, "redirect": self._asked_store or None}
        return Call("GET", self._url_path, lambda said: said, query=query, headers=headers)

    def turns_to_service(self, error: Trouble) -> bool:
        """Whether what has gone wrong may have been the store's own address; it is not asked again."""
        self._may_ask_store = False
        says_when = isinstance(error, ApiError) and error.retry_after_s is not None
        return self._asked_store and not says_when

    @contextmanager
    def receiving(self, response: httpx2.Response) -> Iterator[Callable[[bytes], None]]:
        """What takes the pieces of an answer to `call`."""
        size, etag = self._part.size_bytes(), self._part.etag()
        if response.status_code == RANGE_NOT_SATISFIABLE:
            # The part is as long as the whole, or longer: only its digest can tell.
            is_whole = response.headers.get("Content-Range") == f"bytes */{size}"
            self._digest = _unquoted(etag) if is_whole else None
            yield lambda _piece: None
            return
        # Who sends elsewhere says what is there.
        promise = response.history[0] if response.history else response
        if response.status_code != _PARTIAL:
            self._part.begin(promise.headers.get("ETag", ""))
            size = 0
        self._digest = _promised_sha256(promise)
        total = size + int(response.headers.get("Content-Length", 0))
        with self._part.appending() as file:

            def take(piece: bytes) -> None:
                nonlocal size
                file.write(piece)
                size += len(piece)
                if self._on_progress is not None:
                    self._on_progress(size, total)

            yield take

    def is_finished(self) -> bool:
        """Let the file appear if it is what was promised; or else forget what came, and say no.

        Raises:
            CorruptError: this is the second time that it is not.
        """
        if self._digest is not None and self._part.sha256() == self._digest:
            self._part.finish()
            return True
        self._part.discard()
        self._may_ask_store = False
        self._num_mismatches += self._digest is not None
        if self._num_mismatches == _MAX_MISMATCHES:
            raise CorruptError(
                f"{self._url_path}: what arrived twice does not match the service's sha256; nothing was written "
                f"to {self.target}"
            )
        return False


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
        # A link is written through: what replaced it would leave what it points to as it was.
        self.target = target = target.resolve() if target.is_symlink() else target
        if not target.name:
            raise InvalidInputError(f"'{target}' is a folder; name a file to write", code=_NOT_WRITABLE)
        self._path = target.with_name(target.name + ".part")
        self._etag_path = target.with_name(target.name + ".part.etag")

    def check_writable(self) -> None:
        """Fail before anything is downloaded rather than after."""
        with self._faults_named():
            if self.target.exists() and not self.target.is_file():
                kind = "a folder" if self.target.is_dir() else "no plain file, and would be replaced by one"
                raise InvalidInputError(f"{self.target} is {kind}; name a file to write", code=_NOT_WRITABLE)
            self._path.open("ab").close()
            if not self.size_bytes():
                self._path.unlink()  # a refusal leaves nothing behind

    def size_bytes(self) -> int:
        """How much is there."""
        return self._path.stat().st_size if self._path.exists() else 0

    def etag(self) -> str:
        """The ETag of what is there, or an empty string when that is not known, or not what was written here."""
        try:
            said = self._etag_path.read_text(encoding="ascii")
        except (OSError, ValueError):
            return ""
        return said if _ETAG.fullmatch(said) else ""

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
                code=_NOT_WRITABLE,
            ) from None
