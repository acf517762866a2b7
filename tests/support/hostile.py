"""Files in torch's own formats that mean harm."""

from __future__ import annotations

import os
import zipfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


class Canary:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


def archive(path: Path, pickled: bytes, *, compression: int = zipfile.ZIP_STORED) -> None:
    """A file laid out as `torch.save` does it, around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", b"3\n")
        file.writestr("archive/byteorder", b"little")
