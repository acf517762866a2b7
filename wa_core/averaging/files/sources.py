"""Readable checkpoints: what tensors there are, and their bytes on demand.

One `Source` is one checkpoint in one or more safetensors files, on this machine or in an object store. It knows
names, headers and indexes; it does not know rules, arithmetic or torch. The invariant: a source that could be
opened has passed the header gate in every file, each file is exactly as long as its header says, and every tensor
is there once under its canonical name. The data itself is only read when asked for.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from wa_core.averaging.buffers import new_buffer
from wa_core.averaging.files.index import bad_index, parse_index
from wa_core.averaging.files.parts import FilePart, ObjectPart, cut_off, read_header
from wa_core.averaging.files.stored import Piece, StoredTensor, Stretch
from wa_core.errors import CorruptError, StoreUnavailableError, WeightAveragingError
from wa_core.specs import TensorSpec, canonical_name, name_collision, parse_ties, shorten, torch_dtype_name

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from wa_core.averaging.files.parts import Part
    from wa_core.header import Header
    from wa_core.store.base import ObjectStore

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_HASH_BYTES = 1 << 20
_STEP = re.compile(r"[0-9]{1,18}")


class Source(Protocol):
    """One checkpoint to average. Methods may be called from several threads."""

    @property
    def name(self) -> str:
        """What people call it: its path or URL; every error of the source begins with it."""
        ...

    @property
    def step(self) -> int | None:
        """The optimizer step it was taken at, when known."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """The texts in its header (of its first file)."""
        ...

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Canonical name -> what is stored, in file order; names that are only tied to another are left out."""
        ...

    @property
    def ties(self) -> Mapping[str, str]:
        """Canonical alias -> canonical name of the tensor stored for both."""
        ...

    @property
    def size_bytes(self) -> int:
        """Of all its files together."""
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """The names of its files, without folders."""
        ...

    @property
    def is_remote(self) -> bool:
        """Whether reading pays for every request, so that few large ones are better than many small ones."""
        ...

    @property
    def has_records(self) -> bool:
        """Whether a record says what a file's digest is, so that `digests` can fail."""
        ...

    def read_into(self, name: str, begin: int, out: memoryview) -> None:
        """Fill `out` (writable, flat bytes) with a tensor's bytes from `begin` on.

        Raises:
            CorruptError: the file has become shorter (`truncated_data`).
            StoreUnavailableError: the store is away, or the disk fails.
        """
        ...

    def digests(self) -> dict[str, str]:
        """File name -> SHA-256 in hex. Reads everything once, unless the digests are known.

        Raises:
            CorruptError: a file is not the recorded one (`digest_mismatch`).
        """
        ...

    def close(self) -> None:
        """Let go of the files; a closed source cannot be read."""
        ...


class FilesSource:
    """A checkpoint in safetensors files that together hold every tensor once.

    Args:
        name: its path or URL.
        parts: the files, in order; closed with the source, and when it cannot be opened.
        step: the optimizer step; the metadata entry ``step`` of the first file when not given.

    Raises:
        CorruptError: with the codes of `wa_core.header`, or `truncated_data`, `trailing_bytes`, `bad_ties`,
            `duplicate_name` (two files hold one tensor).
        IncompatibleError: two names have one canonical form (`name_collision`).
    """

    def __init__(self, name: str, parts: Sequence[Part], *, step: int | None = None) -> None:
        self.name = name
        self._parts = tuple(parts)
        self.files = tuple(part.name for part in parts)
        self.size_bytes = sum(part.size_bytes for part in parts)
        self.is_remote = any(part.is_remote for part in parts)
        self.has_records = any(part.sha256 is not None for part in parts)
        self.tensors: dict[str, StoredTensor] = {}
        self.ties: dict[str, str] = {}
        self._digests: list[hashlib._Hash] = []
        try:
            headers = [self._read_header(number) for number in range(len(parts))]
        except BaseException:
            self.close()
            raise
        self.metadata: Mapping[str, str] = headers[0].metadata
        self.step = _step_of(self.metadata) if step is None else step

    def read_into(self, name: str, begin: int, out: memoryview) -> None:
        """Fill `out` with a tensor's bytes from `begin` on."""
        tensor = self.tensors[name]
        self._read(tensor.file, tensor.begin + begin, out)

    @property
    def data_bytes(self) -> int:
        """Of all tensors together."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    def stretches(self, max_bytes: int) -> list[Stretch]:
        """All data, in file order, cut into stretches of whole elements, for reading everything once."""
        found: list[Stretch] = []
        for tensor in self.tensors.values():
            room = max_bytes - max_bytes % tensor.item_bytes
            for begin in range(0, tensor.size_bytes, room):
                piece = Piece(tensor, begin, min(tensor.size_bytes, begin + room))
                if found and found[-1].takes(piece, max_bytes):
                    found[-1].pieces.append(piece)
                else:
                    found.append(Stretch(tensor.file, [piece]))
        return found

    def read_stretch(self, stretch: Stretch, out: memoryview) -> None:
        """Fill `out` with a stretch's bytes."""
        self._read(stretch.file, stretch.begin, out)

    def start_digests(self) -> list[hashlib._Hash]:
        """For each file a SHA-256 that has taken in its header; its data has to follow in file order."""
        return [digest.copy() for digest in self._digests]

    def check_digests(self, found: Sequence[str]) -> dict[str, str]:
        """File name -> digest in hex, after comparing with what is recorded.

        Raises:
            CorruptError: `digest_mismatch`.
        """
        for number, (part, sha256) in enumerate(zip(self._parts, found, strict=True)):
            if part.sha256 not in (None, sha256):
                message = f"the record says sha256 {part.sha256}, the bytes have {sha256}; fetch the file again"
                raise self._named(CorruptError(message, code="digest_mismatch"), number)
        return dict(zip(self.files, found, strict=True))

    def digests(self) -> dict[str, str]:
        """File name -> SHA-256 in hex; all data is read once more, recorded digests are checked."""
        digests, buffer = self.start_digests(), new_buffer(_HASH_BYTES).data
        for stretch in self.stretches(_HASH_BYTES):
            block = buffer[: stretch.end - stretch.begin]
            self.read_stretch(stretch, block)
            digests[stretch.file].update(block)
        return self.check_digests([digest.hexdigest() for digest in digests])

    def close(self) -> None:
        """Close the files."""
        for part in self._parts:
            part.close()

    def _read_header(self, number: int) -> Header:
        part = self._parts[number]
        try:
            header, start = read_header(part)
            self._take(number, header, len(start))
            self._digests.append(hashlib.sha256(start))
        except WeightAveragingError as error:
            raise self._named(error, number) from None
        return header

    def _take(self, number: int, header: Header, data_begin: int) -> None:
        names: dict[str, str] = {}
        for region in header.regions:
            name = names[region.name] = canonical_name(region.name)
            if name in self.tensors and self.tensors[name].file != number:
                raise CorruptError(
                    f"tensor {name!r} is here and in {self.files[self.tensors[name].file]} too, so its value "
                    f"depends on the reader; save the checkpoint again",
                    code="duplicate_name",
                )
            if name in self.tensors or name in self.ties:
                raise name_collision(region.name)
            spec = TensorSpec(name, torch_dtype_name(region.dtype), region.shape)
            size_bytes, begin = region.end - region.begin, data_begin + region.begin
            self.tensors[name] = StoredTensor(spec, region.dtype, size_bytes, number, begin)
        for alias, original in parse_ties(header.metadata, names.keys()).items():
            canonical = canonical_name(alias)
            if canonical in self.tensors or canonical in self.ties:
                raise name_collision(alias)
            self.ties[canonical] = names[original]

    def _read(self, number: int, begin: int, out: memoryview) -> None:
        part = self._parts[number]
        try:
            found = part.read_into(begin, out)
        except WeightAveragingError as error:
            raise self._named(error, number) from error
        except OSError as error:
            raise self._named(_disk_failed(error), number) from error
        if found < len(out):
            raise self._named(cut_off(part.size_bytes, begin + found), number)

    def _named(self, error: WeightAveragingError, number: int) -> WeightAveragingError:
        part = self._parts[number].name
        where = self.name if self.name.endswith(part) else f"{self.name} ({part})"
        return type(error)(f"{where}: {error.message}", code=error.code)


def open_source(
    where: str | os.PathLike[str],
    *,
    step: int | None = None,
    size_bytes: int | None = None,
    sha256: str | None = None,
) -> FilesSource:
    """Open a local checkpoint: a safetensors file, a sharded index, or a folder that holds either.

    Args:
        where: the path.
        step: the optimizer step; the metadata entry ``step`` when not given.
        size_bytes: what a record says of a single file.
        sha256: the same, in hex.

    Raises:
        InvalidInputError: there is no such file.
        CorruptError, IncompatibleError: as for `FilesSource`; or the index is damaged (`bad_index`).
    """
    path = Path(where)
    if path.is_dir():
        path = path / INDEX_NAME if (path / INDEX_NAME).exists() else path / SINGLE_NAME
    if not path.name.endswith(".index.json"):
        return FilesSource(str(where), [FilePart(path, size_bytes=size_bytes, sha256=sha256)], step=step)
    index = FilePart(path)
    try:
        return _open_shards(str(where), index, lambda shard: FilePart(path.with_name(shard)), step=step)
    finally:
        index.close()


def open_object(
    store: ObjectStore,
    key: str,
    *,
    step: int | None = None,
    name: str | None = None,
    size_bytes: int | None = None,
    sha256: str | None = None,
    whole_bytes: int = 0,
) -> FilesSource:
    """Open a checkpoint in an object store: a safetensors object or a sharded index.

    Args:
        store: where it is.
        key: its key.
        step: the optimizer step; the metadata entry ``step`` when not given.
        name: what people call it, such as its ``s3://`` URL; the key when not given.
        size_bytes: what a record says of a single object.
        sha256: the same, in hex.
        whole_bytes: a single object of at most this size is fetched now, whole; with `size_bytes` by one request.

    Raises:
        ObjectNotFoundError: no object has this key.
        CorruptError, IncompatibleError: as for `open_source`.
    """
    part = ObjectPart(store, key, size_bytes=size_bytes, sha256=sha256, whole_bytes=whole_bytes)
    if not key.endswith(".index.json"):
        return FilesSource(name or key, [part], step=step)
    folder = key[: -len(part.name)]
    return _open_shards(name or key, part, lambda shard: ObjectPart(store, folder + shard), step=step)


def _open_shards(name: str, index: Part, open_part: Callable[[str], Part], *, step: int | None) -> FilesSource:
    weight_map = parse_index(name, index)
    parts: list[Part] = []
    try:
        parts.extend(open_part(shard) for shard in sorted(set(weight_map.values())))
    except BaseException:
        for part in parts:
            part.close()
        raise
    source = FilesSource(name, parts, step=step)
    listed = {canonical_name(tensor) for tensor in weight_map}
    if not source.tensors.keys() <= listed <= source.tensors.keys() | source.ties.keys():
        odd = sorted(listed ^ source.tensors.keys())
        source.close()
        raise bad_index(name, f"it and its files disagree about {shorten([repr(tensor) for tensor in odd])}")
    return source


def specs_of(source: Source) -> tuple[TensorSpec, ...]:
    """The specs of all names in a source, tied ones included, sorted."""
    stored = {name: tensor.spec for name, tensor in source.tensors.items()}
    tied = (TensorSpec(alias, stored[name].dtype, stored[name].shape) for alias, name in source.ties.items())
    return tuple(sorted((*stored.values(), *tied)))


def _disk_failed(error: OSError) -> StoreUnavailableError:
    return StoreUnavailableError(f"it cannot be read: {error.strerror or error}; check the disk")


def _step_of(metadata: Mapping[str, str]) -> int | None:
    text = metadata.get("step", "")
    return int(text) if _STEP.fullmatch(text) else None
