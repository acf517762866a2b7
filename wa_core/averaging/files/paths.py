"""Checkpoints and outputs that are given as paths: the name decides how one is opened, or written.

It knows names, folders and which formats there are; no arithmetic and no torch. The invariant: nothing but the
output is left behind, whatever was converted or put together on the way.
"""

from __future__ import annotations

import secrets
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from wa_core.averaging.files.converted import ConvertedSource
from wa_core.averaging.files.foreign import TORCH_SUFFIXES, convert_checkpoint, is_torch_format
from wa_core.averaging.files.output import SafetensorsWriter, leave_to_system, sync_path
from wa_core.averaging.files.sources import open_source
from wa_core.averaging.files.staging import Staging
from wa_core.averaging.files.writers import StagedWriter, find_companions
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wa_core.averaging.files.output import Writer
    from wa_core.averaging.files.sources import FilesSource
    from wa_core.averaging.files.writers import OutputFormat

#: Where a Hugging Face folder's files are cut: what its own writers use.
FOLDER_SHARD_BYTES = 5 * 10**9


@contextmanager
def opened_path(path: str | Path, *, scratch: Path | None = None) -> Iterator[FilesSource]:
    """The checkpoint at `path`, until the block is left; one in torch's own format by way of a conversion.

    Args:
        path: safetensors, a sharded index, a Hugging Face folder, `.pt`, `.ckpt`, or a DCP folder.
        scratch: the folder for conversions; the system's when None.

    Raises:
        InvalidInputError, CorruptError, IncompatibleError: as for `open_source` and `convert_checkpoint`.
    """
    where = Path(path)
    if not is_torch_format(where):
        with closing(open_source(path)) as source:
            yield source
        return
    with tempfile.TemporaryDirectory(prefix=".wa-average-", dir=scratch) as folder:
        converted = Path(folder) / "weights.safetensors"
        convert_checkpoint(where, converted)
        with closing(ConvertedSource(str(path), converted, originals=files_of(where))) as source:
            yield source


@contextmanager
def opened_output(path: Path, *, newest: str, fsync: bool) -> Iterator[Writer]:
    """A writer for `path`, in the format that its name stands for; what an error leaves half done is removed.

    Args:
        path: the output.
        newest: the newest checkpoint; the configuration for a Hugging Face folder lies beside it, if it is a path.
        fsync: wait until the output is on the disk.

    Raises:
        InvalidInputError: the name does not tell a format, or the output cannot be written.
    """
    sync = sync_path if fsync else leave_to_system
    file_format = format_of(path)
    if file_format == "safetensors":
        yield SafetensorsWriter(path, sync=sync)
        return
    companions = find_companions(Path(newest)) if file_format == "hf" else []
    # A job of its own: it goes on with nothing that another one has left.
    staging = Staging(path, job=[secrets.token_hex()])
    try:
        yield StagedWriter(
            staging,
            file_format=file_format,
            max_shard_bytes=FOLDER_SHARD_BYTES,
            companions=companions,
            sync=sync,
        )
    except BaseException:
        staging.remove()
        raise


def format_of(output: Path) -> OutputFormat:
    """What an output's name stands for: a torch suffix, none for a folder, else safetensors.

    Raises:
        InvalidInputError: the name does not tell.
    """
    if output.suffix in TORCH_SUFFIXES:
        return "pt"
    if output.suffix == ".safetensors":
        return "safetensors"
    if not output.suffix or output.is_dir():
        return "hf"
    raise InvalidInputError(
        f"{output} could be anything; name it .safetensors or .pt, or without a dot for a folder, or give --format"
    )


def folder_of(output: Path) -> Path:
    """The folder that an output will be in.

    Raises:
        InvalidInputError: `output_not_writable`: there is no such folder, or the output is a device or a pipe.
    """
    folder = output.resolve().parent
    if output.exists() and not (output.is_file() or output.is_dir()):
        raise InvalidInputError(
            f"{output} is no plain file, and would be replaced by one; choose another place",
            code="output_not_writable",
        )
    if not folder.is_dir():
        raise InvalidInputError(
            f"{output} cannot be written: there is no folder {output.parent}; make it, or choose another",
            code="output_not_writable",
        )
    return folder


def files_of(path: Path) -> list[Path]:
    """The file itself, or all files in a folder."""
    return sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
