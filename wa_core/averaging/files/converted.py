"""A checkpoint in torch's own format, read from its conversion to safetensors.

It knows which files were converted; not how. The invariant: what the source says of itself for the record (files,
size, digests) is about what people have, not about the conversion, which is gone after the merge.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from wa_core.averaging.files.parts import FilePart
from wa_core.averaging.files.sources import FilesSource
from wa_core.errors import StoreUnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class ConvertedSource(FilesSource):
    """The weights of `converted`, under the name, size and digests of the original.

    Args:
        name: the original's path or URL.
        converted: the safetensors file made of it.
        originals: the original's files where they are on this machine; none: no digests are known.

    Raises:
        CorruptError, IncompatibleError: as for `FilesSource`.
    """

    def __init__(self, name: str, converted: Path, *, originals: Sequence[Path]) -> None:
        super().__init__(name, [FilePart(converted)])
        self._originals = tuple(originals)
        self.files = tuple(path.name for path in self._originals)
        if self._originals:
            self.size_bytes = sum(path.stat().st_size for path in self._originals)

    def digests(self) -> dict[str, str]:
        """File name -> SHA-256 in hex, of the original files; each is read once more.

        Raises:
            StoreUnavailableError: one cannot be read any more.
        """
        return {path.name: self._digest(path) for path in self._originals}

    def _digest(self, path: Path) -> str:
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise StoreUnavailableError(
                f"{self.name}: {path.name} cannot be read: {error.strerror or error}; check the disk"
            ) from error
