"""A state dict as a file of `torch.save`, written in one pass over its tensors' bytes, without torch.

It knows the layout of that archive; not where tensors come from. The invariant: the file loads with
``torch.load(path, weights_only=True)``, mapped or not, and tied tensors share memory again; what is held in memory
is a block and the names.

Source: the format as torch/serialization.py (2.13) and caffe2/serialize/inline_container.cc read it: a zip
archive, stored and not deflated, of ``data.pkl`` (the dict, its storages by number) and an aligned entry for each
storage.
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from typing import TYPE_CHECKING

from wa_core.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from wa_core.averaging.files.stored import StoredTensor

_ROOT = "archive"
_ALIGNMENT = 64
_LOCAL_HEADER_BYTES = 30
_ZIP64_EXTRA_BYTES = 20
_ZIP64_FROM = 1 << 31
_PADDING_TAG = 0x4246  # "FB", as torch pads
_BEFORE_1980 = (1980, 1, 1, 0, 0, 0)  # the same weights give the same bytes
# Dtypes with a storage class of their own; the others are rebuilt from untyped bytes.
_STORAGES = {
    "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
    "int64": "LongStorage", "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage",
    "uint8": "ByteStorage", "bool": "BoolStorage", "complex64": "ComplexFloatStorage",
}  # fmt: skip


def write_archive(
    path: Path,
    tensors: Sequence[StoredTensor],
    *,
    ties: Mapping[str, str],
    blocks: Callable[[StoredTensor], Iterable[memoryview]],
) -> None:
    """Write a state dict to `path`, which must not be in use.

    Args:
        path: the file.
        tensors: what is in it; each is a storage of its own.
        ties: alias -> name of the tensor whose memory it shares.
        blocks: the bytes of a tensor, in order, cut anywhere.

    Raises:
        InvalidInputError: `path` cannot be written (`output_not_writable`).
    """
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            _add(archive, "data.pkl", [memoryview(_pickled(tensors, ties))])
            _add(archive, "byteorder", [memoryview(b"little")])
            for number, tensor in enumerate(tensors):
                _add(archive, f"data/{number}", blocks(tensor), size_bytes=tensor.size_bytes)
            _add(archive, "version", [memoryview(b"3\n")])
    except OSError as error:
        raise InvalidInputError(
            f"{path} cannot be written: {error.strerror or error}; free the space or choose another place",
            code="output_not_writable",
        ) from error


def _add(archive: zipfile.ZipFile, name: str, blocks: Iterable[memoryview], *, size_bytes: int = 0) -> None:
    info = zipfile.ZipInfo(f"{_ROOT}/{name}", _BEFORE_1980)
    is_large = size_bytes >= _ZIP64_FROM
    assert archive.fp is not None  # noqa: S101  it is open for writing
    begin = archive.fp.tell() + _LOCAL_HEADER_BYTES + len(info.filename) + 4 + _ZIP64_EXTRA_BYTES * is_large
    padding = -begin % _ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_TAG, padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=is_large) as file:
        for block in blocks:
            file.write(block)


def _pickled(tensors: Sequence[StoredTensor], ties: Mapping[str, str]) -> bytes:
    """The dict, sorted by name, in pickle protocol 2: torch's own globals, storages as persistent ids."""
    numbers = {tensor.spec.name: number for number, tensor in enumerate(tensors)}
    numbers |= {alias: numbers[name] for alias, name in ties.items()}
    items = b"".join(_text(name) + _tensor(number, tensors[number]) for name, number in sorted(numbers.items()))
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def _tensor(number: int, tensor: StoredTensor) -> bytes:
    dtype, shape = tensor.spec.dtype, tensor.spec.shape
    # An untyped storage counts bytes.
    storage, length = (
        (_global("torch", _STORAGES[dtype]), tensor.num_elements)
        if dtype in _STORAGES
        else (_global("torch.storage", "UntypedStorage"), tensor.size_bytes)
    )
    place = _tuple([_text("storage"), storage, _text(str(number)), _text("cpu"), _int(length)])
    strides = [math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape))]
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = [place + pickle.BINPERSID, _int(0), _ints(shape), _ints(strides), pickle.NEWFALSE, hooks]
    if dtype in _STORAGES:
        return _global("torch._utils", "_rebuild_tensor_v2") + _tuple(arguments) + pickle.REDUCE
    arguments.append(_global("torch", dtype))
    return _global("torch._utils", "_rebuild_tensor_v3") + _tuple(arguments) + pickle.REDUCE


def _tuple(parts: Iterable[bytes]) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE


def _ints(numbers: Iterable[int]) -> bytes:
    return _tuple(map(_int, numbers))


def _int(number: int) -> bytes:
    if number < 1 << 31:
        return pickle.BININT + struct.pack("<i", number)
    encoded = pickle.encode_long(number)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
