"""A folder of `torch.distributed.checkpoint`, read without a process group, by the conversion's child only.

It knows torch's folder format. torch itself reads the folder's index with plain pickle; here only the classes that
the format consists of are let through. The invariant: nothing outside of the folder is read, no code of the index
is run, and nothing is allocated before it is asked for.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from wa_core.averaging.files.foreign import WEIGHT_KEYS, unsafe_pickle
from wa_core.errors import CorruptError, IncompatibleError
from wa_core.specs import canonical_name, name_collision

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_SHOWN = 8
# What torch.distributed.checkpoint pickles into `.metadata`; all of it is data.
_GLOBALS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PurePosixPath", "PosixPath"},
}  # fmt: skip


class DcpFolder:
    """The weights in a folder, by canonical name; optimizer state and the like are left out.

    Raises:
        CorruptError: the index is damaged, or asks for more than the format has (`unsafe_pickle`).
        IncompatibleError: `no_weights`, `several_weights` or `name_collision`.
    """

    def __init__(self, path: Path) -> None:
        self._reader = _DataReader(path)
        self._stored = _find_weights(self._reader.read_metadata())
        self.names = tuple(self._stored)
        self.size_bytes = sum(part.stat().st_size for part in path.iterdir() if part.is_file())

    def describe(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of one tensor."""
        _, spec = self._stored[name]
        return spec.properties.dtype, tuple(spec.size)

    def read(self, name: str) -> torch.Tensor:
        """One tensor, put together from its parts."""
        stored_name, spec = self._stored[name]
        tensor = torch.empty(spec.size, dtype=spec.properties.dtype)
        state_dict_loader.load({stored_name: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles the index of a DCP folder, which torch itself would read with plain pickle."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401  as in the base class
        if name in _GLOBALS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise unsafe_pickle(f"GLOBAL {module}.{name}")


class _DataReader(FileSystemReader):
    """Reads a DCP folder without running what its index says, and without leaving the folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self._found: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:  # noqa: ANN401  as in the base class
        if self._found is None:
            with (self._folder / ".metadata").open("rb") as file:
                found = _MetadataUnpickler(file).load()
            if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
                raise CorruptError("its .metadata is not an index of torch.distributed.checkpoint")
            for place in found.storage_data.values():
                part = (self._folder / place.relative_path).resolve()
                if not part.is_relative_to(self._folder.resolve()):
                    raise CorruptError(f"its index points outside of the folder, to {place.relative_path!a}")
            self._found = found
        return self._found


def _find_weights(metadata: Metadata) -> dict[str, tuple[str, TensorStorageMetadata]]:
    """Canonical name -> (name in the folder, what is stored), for the weights alone."""
    paths = metadata.planner_data if isinstance(metadata.planner_data, dict) else {}
    tops: dict[str | None, dict[str, TensorStorageMetadata]] = {}
    for name, spec in metadata.state_dict_metadata.items():
        path = paths.get(name) or (name,)
        top = str(path[0]) if len(path) > 1 else None
        if isinstance(spec, TensorStorageMetadata):
            tops.setdefault(top, {})[name] = spec
    top = _choose_top(tops)
    found: dict[str, tuple[str, TensorStorageMetadata]] = {}
    for name, spec in tops[top].items():
        plain = name.removeprefix(f"{top}.") if top else name
        if (canonical := canonical_name(plain)) in found:
            raise name_collision(plain)
        found[canonical] = name, spec
    return found


def _choose_top(tops: Mapping[str | None, object]) -> str | None:
    nested = [key for key in WEIGHT_KEYS if key in tops]
    if len(nested) == 1:
        return nested[0]
    if not nested and None in tops:
        return None
    found = ", ".join(repr(top) for top in list(tops)[:_SHOWN] if top) or "nothing that is a tensor"
    raise IncompatibleError(
        f"weights were looked for under one of {', '.join(WEIGHT_KEYS)}, but the folder holds {found}; save the "
        f"model's state dict under 'model'",
        code="several_weights" if nested else "no_weights",
    )
