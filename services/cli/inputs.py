"""What people type as SOURCE, turned into checkpoints: paths, patterns, folders, s3:// URLs.

It knows file systems, buckets and how folders of checkpoints are laid out; not what is in a file. The invariant:
every text stands for one checkpoint at least, or there is an error that names the text; the output is never an
input by way of a pattern or a folder.
"""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from wa_core.averaging.files.converted import ConvertedSource
from wa_core.averaging.files.foreign import TORCH_SUFFIXES, convert_checkpoint, is_dcp_folder, is_torch_format
from wa_core.averaging.files.paths import files_of
from wa_core.averaging.files.sources import open_object, open_source
from wa_core.errors import InvalidInputError, ObjectNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from wa_core.averaging.files.sources import FilesSource
    from wa_core.store.base import ObjectStore

_S3 = "s3://"
_WILDCARDS = re.compile(r"[*?\[]")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.safetensors\Z")
_INDEX_SUFFIX = ".safetensors.index.json"
_DIGITS = re.compile(r"(\d+)")
_MAX_FOLDER_DEPTH = 4
# torch files beside the weights that hold no weights: Hugging Face's Trainer's, and ours.
_NO_WEIGHTS = ("optimizer*", "scheduler*", "rng_state*", "training_args*", "trainer.pt", "scaler*")


@dataclass(frozen=True, slots=True)
class Found:
    """One checkpoint: a local `path`, or `key` in a `store`. `stamp` changes when its bytes do."""

    name: str
    stamp: str
    path: Path | None = None
    store: ObjectStore | None = None
    key: str = ""

    @property
    def is_foreign(self) -> bool:
        """Whether it must be converted before it can be read."""
        return is_torch_format(self.path or Path(self.key))

    def open(self, converted: Path) -> FilesSource:
        """Open it; one in torch's own format as `converted`, which is made unless it is there."""
        if self.is_foreign:
            if not converted.exists():
                self._convert(converted)
            return ConvertedSource(self.name, converted, originals=files_of(self.path) if self.path else ())
        if self.store is not None:
            return open_object(self.store, self.key, name=self.name)
        return open_source(self.name)

    def _convert(self, converted: Path) -> None:
        if self.path is not None:
            convert_checkpoint(self.path, converted)
            return
        fetched = converted.with_name(f"{converted.stem}-{PurePosixPath(self.key).name}")
        try:
            with fetched.open("wb") as file:
                for chunk in self._store().stream(self.key):
                    file.write(chunk)
            convert_checkpoint(fetched, converted)
        finally:
            fetched.unlink(missing_ok=True)

    def _store(self) -> ObjectStore:
        assert self.store is not None  # noqa: S101  there is a path otherwise
        return self.store


def find_checkpoints(texts: Sequence[str], *, output: Path | None) -> list[Found]:
    """All checkpoints that the texts stand for: texts in their order, the matches of one in natural order.

    Args:
        texts: as typed.
        output: the file or folder to be written; patterns do not match it, and it is not looked for in folders.

    Raises:
        InvalidInputError: a text stands for nothing, or the output is named as a source.
        StoreUnavailableError, StoreAuthError, ConfigurationError: a bucket cannot be listed.
    """
    found: list[Found] = []
    for text in texts:
        matches = _find_objects(text) if text.startswith(_S3) else _find_files(text, output)
        found += [one for one in matches if one.name not in {known.name for known in found}]
    return found


def choose_checkpoints(files: Iterable[str]) -> list[str]:
    """Which of a folder's files are its checkpoints. Pure; the paths are relative to the folder.

    A folder of one model (an index, or `model.safetensors`, or a DCP index) stands for that model; any other for
    all its safetensors files, or all its torch files, or what its folders stand for.
    """
    paths = sorted((file for file in files if _is_visible(file)), key=natural_key)
    here = [path for path in paths if "/" not in path]
    weights = [path for path in here if path.endswith(".safetensors") and not _SHARD.match(path)]
    torch_files = [
        path for path in here if PurePosixPath(path).suffix in TORCH_SUFFIXES and _may_hold_weights(path)
    ]
    one_model = [name for name in ("model.safetensors", ".metadata", "pytorch_model.bin") if name in here]
    if indexes := [path for path in here if path.endswith(_INDEX_SUFFIX)]:
        return indexes
    if one_model:
        return ["." if one_model[0] == ".metadata" else one_model[0]]
    if weights or torch_files:
        return weights or torch_files
    folders: dict[str, list[str]] = {}
    for path in paths:
        folder, _, rest = path.partition("/")
        if rest:
            folders.setdefault(folder, []).append(rest)
    return [f"{folder}/{inner}" for folder, rests in folders.items() for inner in choose_checkpoints(rests)]


def natural_key(text: str) -> list[str | tuple[int, str]]:
    """Sorts step_100 before step_1000."""
    parts = _DIGITS.split(text)
    return [(int(part), part) if part.isdecimal() else part for part in parts]


def _is_visible(path: str) -> bool:
    return all(not part.startswith(".") or part == ".metadata" for part in path.split("/"))


def _may_hold_weights(path: str) -> bool:
    return not any(fnmatchcase(path, pattern) for pattern in _NO_WEIGHTS)


def _find_files(text: str, output: Path | None) -> list[Found]:
    if not _WILDCARDS.search(text) or Path(text).exists():
        if output is not None and output.exists() and Path(text).exists() and output.samefile(text):
            raise InvalidInputError(f"{text} is a source and the output; choose another name with -o")
        return _find_path(text, output)
    matches = sorted(glob.glob(text, recursive=True), key=natural_key)  # noqa: PTH207  patterns may be absolute
    usable = [match for match in matches if not _is_output(Path(match), output) and _is_checkpoint(Path(match))]
    if not usable:
        raise InvalidInputError(f"{text} matches no checkpoint{' but other files' if matches else ''}; check it")
    whole = _join_shards(usable, lambda index: Path(index).exists())
    return [one for match in whole for one in _find_path(match, output)]


def _is_output(path: Path, output: Path | None) -> bool:
    """Whether it is what an earlier try has made: the output, a file in it, or one of its shards."""
    if output is None:
        return False
    own, path = output.resolve(), path.resolve()
    shard = _SHARD.match(path.name)
    of = f"{shard['stem']}.safetensors" if shard else path.name.removesuffix(".index.json")
    return own == path or own in path.parents or own == path.with_name(of)


def _is_checkpoint(path: Path) -> bool:
    if path.is_dir():
        return bool(choose_checkpoints(_files_below(path)))
    return path.suffix in TORCH_SUFFIXES | {".safetensors"} or path.name.endswith(_INDEX_SUFFIX)


def _find_path(text: str, output: Path | None) -> list[Found]:
    path = Path(text)
    if not path.is_dir() or is_dcp_folder(path):
        return [Found(text, _stamp(path), path=path)]
    inside = choose_checkpoints(file for file in _files_below(path) if not _is_output(path / file, output))
    if not inside:
        raise InvalidInputError(
            f"{text} holds no checkpoint (no .safetensors, .pt, .ckpt or torch.distributed.checkpoint folder); "
            f"name the files"
        )
    paths = [path / one for one in inside]
    return [Found(str(one), _stamp(one), path=one) for one in paths]


def _files_below(folder: Path) -> list[str]:
    found = []
    for root, folders, files in os.walk(folder):
        relative = Path(root).relative_to(folder)
        if len(relative.parts) >= _MAX_FOLDER_DEPTH:
            folders.clear()
        found += [(relative / file).as_posix() for file in files]
    return found


def _stamp(path: Path) -> str:
    """Size and time of a file, or of all files beside an index or in a folder."""
    try:
        files = files_of(path.parent if path.name.endswith(_INDEX_SUFFIX) else path)
        return ";".join(f"{one.name}:{(at := one.stat()).st_size}:{at.st_mtime_ns}" for one in files)
    except OSError as error:
        raise InvalidInputError(f"{path}: {error.strerror}; check the name and its permissions") from None


def _join_shards(names: Sequence[str], exists: Callable[[str], bool]) -> list[str]:
    """The same, with every group of shards as its index."""
    joined: dict[str, None] = {}
    for name in names:
        if (shard := _SHARD.match(name)) is None:
            joined[name] = None
            continue
        index = f"{shard['stem']}{_INDEX_SUFFIX}"
        if not exists(index):
            raise InvalidInputError(f"{name} is a part of a checkpoint, but its index {index} is missing")
        joined[index] = None
    return list(joined)


def _find_objects(url: str) -> list[Found]:
    bucket, _, key = url.removeprefix(_S3).partition("/")
    store = _open_bucket(url, bucket)
    cut = _WILDCARDS.search(key)
    prefix = key[: cut.start()].rpartition("/")[0] if cut else key.rstrip("/")
    stamps = _list(store, f"{prefix}/" if prefix else "")
    if cut:
        matches = [found for found in stamps if _matches(found, key)]
        usable = _join_shards([one for one in matches if _is_checkpoint(Path(one))], stamps.__contains__)
    elif not stamps:
        return [_find_object(url, store, key)]
    else:
        skip = len(prefix) + 1 if prefix else 0
        usable = [f"{prefix}/{one}" if prefix else one for one in choose_checkpoints(f[skip:] for f in stamps)]
    if not usable:
        raise InvalidInputError(f"{url} matches no checkpoint among {len(stamps)} objects; check the prefix")
    return [_found_object(bucket, store, key, stamps) for key in sorted(usable, key=natural_key)]


def _open_bucket(url: str, bucket: str) -> ObjectStore:
    if not re.fullmatch(r"[a-z0-9.-]{3,63}", bucket):
        raise InvalidInputError(f"{url}: {bucket!r} is no bucket's name; write s3://bucket/prefix")
    # Not at the top: files need neither, and loading them takes longer than averaging a small model.
    from services.runtime.settings import Settings
    from services.runtime.stores import open_store

    return open_store(Settings().model_copy(update={"store_url": f"{_S3}{bucket}"}))


def _list(store: ObjectStore, prefix: str) -> dict[str, str]:
    return {one.key: f"{one.size_bytes}:{one.modified_at}" for one in store.list(prefix)}


def _find_object(url: str, store: ObjectStore, key: str) -> Found:
    try:
        info = store.head(key)
    except (ObjectNotFoundError, InvalidInputError):
        raise InvalidInputError(f"{url}: there is no such object, and nothing below it; check the URL") from None
    return Found(url, f"{info.size_bytes}:{info.modified_at}", store=store, key=key)


def _found_object(bucket: str, store: ObjectStore, key: str, stamps: dict[str, str]) -> Found:
    url = f"{_S3}{bucket}/{key}"
    if key.endswith("/.") or key == ".":
        raise InvalidInputError(f"{url}: a torch.distributed.checkpoint folder must be on this machine; fetch it")
    folder = key.rpartition("/")[0]
    group = [one for one in stamps if one.rpartition("/")[0] == folder] if key.endswith(_INDEX_SUFFIX) else [key]
    return Found(url, ";".join(f"{one}:{stamps[one]}" for one in group), store=store, key=key)


def _matches(key: str, pattern: str) -> bool:
    parts, wanted = key.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
