"""The outputs of `wa average`: one safetensors file, shards with an index, a `.pt` file, a Hugging Face folder.

All of them are made in a `Staging` folder, so that a killed merge can go on, and moved into place at the end, the
index after the shards that it names. It knows formats and names, no arithmetic and no torch. The invariant: until
everything is written, nothing under the output's name changes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from wa_core.averaging.files.foreign import export_pt
from wa_core.averaging.files.output import SafetensorsWriter, leave_to_system
from wa_core.averaging.files.staging import unwritable
from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from wa_core.averaging.files.staging import Staging
    from wa_core.averaging.files.stored import StoredTensor

OutputFormat = Literal["safetensors", "pt", "hf"]
#: Files beside the weights without which a folder does not load, or not as the same model.
COMPANIONS = (
    "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "chat_template*",
)  # fmt: skip
_STEM = "model"


class StagedWriter:
    """A `Writer` of any `OutputFormat`.

    Args:
        staging: the work folder; `commit` removes it, `abort` keeps what is finished.
        file_format: what to make of the output's name: a file, or for ``hf`` a folder.
        max_shard_bytes: tensors beyond this go to the next file; a larger tensor has a file to itself. None: one
            file. Without meaning for ``pt``.
        companions: files to copy into a Hugging Face folder.
        sync: how to wait for the disk, before anything is moved into place and after it, or not at all.

    Raises:
        InvalidInputError: `output_not_writable`; or ``hf`` into a folder that holds something already.
    """

    def __init__(
        self,
        staging: Staging,
        *,
        file_format: OutputFormat,
        max_shard_bytes: int | None = None,
        companions: Iterable[Path] = (),
        sync: Callable[[Path], None] = leave_to_system,
    ) -> None:
        self._staging = staging
        self._sync = sync
        self._format = file_format
        self._max_shard_bytes = None if file_format == "pt" else max_shard_bytes
        self._companions = tuple(companions)
        self._files: dict[str, SafetensorsWriter] = {}
        self._file_of: dict[str, SafetensorsWriter] = {}
        self._weight_map: dict[str, str] = {}
        self._owners: Mapping[str, str] = {}
        self._aliases: dict[str, list[str]] = {}
        self._made = staging.folder / "made"
        self._check_output()

    def begin(
        self, tensors: Sequence[StoredTensor], *, ties: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        """Make room for all files; what a killed merge has finished stays."""
        if self._is_placed_directly:
            # Plain readers know nothing of ties: every alias is a full copy. The other formats have their own way.
            tensors, ties = self._with_aliases(tensors, ties), {}
        shards = split_shards(tensors, self._max_shard_bytes)
        try:
            self._made.mkdir(exist_ok=True)
            for number, shard in enumerate(shards, start=1):
                self._begin_file(self._file_name(number, len(shards)), shard, ties=ties, metadata=metadata)
        except OSError as error:
            raise unwritable(self._staging.output, error) from error

    def has(self, name: str, begin: int, size_bytes: int) -> bool:
        """Whether a killed merge has written these bytes of a tensor already."""
        return self._staging.has(name, begin, begin + size_bytes)

    def write(self, name: str, begin: int, data: memoryview) -> None:
        """Put `data` at byte `begin` of tensor `name`."""
        for copy in (name, *self._aliases.get(name, ())):
            self._file_of[copy].write(copy, begin, data)
        self._staging.note(name, begin, begin + len(data))

    def commit(self, metadata: Mapping[str, str]) -> tuple[Path, ...]:
        """Move everything into place, the index last, and remove the work folder."""
        made = [file for writer in self._files.values() for file in writer.commit(metadata)]
        try:
            if len(made) > 1:
                made.append(self._write_index())
            if self._format == "pt":
                made = [self._export(made[0])]
            elif self._format == "hf":
                made = self._place_folder(made)
        except OSError as error:
            raise unwritable(self._staging.output, error) from error
        self._staging.remove()
        return tuple(made)

    def abort(self) -> None:
        """Stop; what is finished stays in the work folder, for a merge that goes on."""
        for writer in self._files.values():
            writer.suspend()

    @property
    def _is_placed_directly(self) -> bool:
        return self._format == "safetensors"

    def _with_aliases(self, tensors: Sequence[StoredTensor], ties: Mapping[str, str]) -> list[StoredTensor]:
        self._owners = ties
        if not ties:
            return list(tensors)
        for alias, owner in sorted(ties.items()):
            self._aliases.setdefault(owner, []).append(alias)
        found = []
        for tensor in tensors:
            names = [tensor.spec.name, *self._aliases.get(tensor.spec.name, ())]
            found += [replace(tensor, spec=replace(tensor.spec, name=name)) for name in names]
        return found

    def _check_output(self) -> None:
        output = self._staging.output
        if self._format == "hf":
            if output.is_file() or (output.is_dir() and any(output.iterdir())):
                raise InvalidInputError(
                    f"{output} is there and not empty; a folder is never mixed with an older one; choose another "
                    f"name, or remove it"
                )
        elif output.is_dir():
            raise InvalidInputError(f"{output} is a folder; name a file, or write a folder with --format hf")

    def _file_name(self, number: int, count: int) -> str:
        stem = self._staging.output.stem if self._is_placed_directly else _STEM
        if count == 1:
            return self._staging.output.name if self._is_placed_directly else f"{_STEM}.safetensors"
        return f"{stem}-{number:05d}-of-{count:05d}.safetensors"

    def _begin_file(
        self, file: str, shard: Sequence[StoredTensor], *, ties: Mapping[str, str], metadata: Mapping[str, str]
    ) -> None:
        names = [tensor.spec.name for tensor in shard]
        own = {alias: owner for alias, owner in ties.items() if owner in set(names)}
        part = self._staging.folder / f"{file}.data"
        left_over = part.stat().st_size if part.exists() else None
        # What is not in its place yet is waited for there.
        target, sync = (
            (self._staging.output.parent, self._sync)
            if self._is_placed_directly
            else (self._made, leave_to_system)
        )
        self._files[file] = writer = SafetensorsWriter(target / file, part=part, sync=sync)
        writer.begin(shard, ties=own, metadata=metadata)
        if left_over != part.stat().st_size:
            self._staging.forget(self._owners.get(name, name) for name in names)
        self._file_of |= dict.fromkeys(names, writer)
        self._weight_map |= dict.fromkeys(names, file)

    def _write_index(self) -> Path:
        output = self._staging.output
        total = sum(writer.data_bytes for writer in self._files.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self._weight_map.items()))}
        part = self._made / f"{_STEM}.safetensors.index.json"
        part.write_text(json.dumps(index, indent=2) + "\n")
        if not self._is_placed_directly:
            return part
        self._sync(part)
        placed = output.with_name(f"{output.stem}.safetensors.index.json")
        part.replace(placed)
        output.unlink(missing_ok=True)  # the shards stand in its place
        self._sync(output.parent)
        return placed

    def _export(self, weights: Path) -> Path:
        part = self._staging.folder / self._staging.output.name
        export_pt(weights, part)
        self._sync(part)
        made = part.replace(self._staging.output)
        self._sync(made.parent)
        return made

    def _place_folder(self, made: Sequence[Path]) -> list[Path]:
        companions = [Path(shutil.copy(path, self._made / path.name)) for path in self._companions]
        for path in (*self._made.iterdir(), self._made):
            self._sync(path)
        self._made.replace(self._staging.output)
        self._sync(self._staging.output.parent)
        return [self._staging.output / path.name for path in (*made, *companions)]


def split_shards(tensors: Sequence[StoredTensor], max_bytes: int | None) -> list[list[StoredTensor]]:
    """Tensors in order, cut where the next one would make a file's data larger than `max_bytes`."""
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and max_bytes is not None and size + tensor.size_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size_bytes
    return shards


def find_companions(checkpoint: Path) -> list[Path]:
    """The files beside a checkpoint's weights that belong to the model: configuration, tokenizer.

    Args:
        checkpoint: a file, or a folder with the weights in it; one that is not there has none.
    """
    if not checkpoint.exists():
        return []
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return sorted({path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()})
