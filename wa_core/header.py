"""The header gate: decides from a safetensors file's JSON header whether the rest is worth reading.

The format is eight bytes of header length (little-endian), a JSON header, then the tensors' bytes. This module
knows bytes and JSON, no torch; `wa_core.tensors` reads the data. The parser of the safetensors library accepts
duplicate names, ``..`` and NUL in names, and files without tensors; ours refuses them.

The invariant: a `Header` describes at least one tensor, every name once, and regions that cover the data exactly,
without overlap or hole. Nothing is allocated for what a header merely claims.

Source: the format's description in the safetensors README, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from wa_core.errors import CorruptError

LENGTH_BYTES = 8
HEADER_LIMIT_BYTES = 16 * 1024 * 1024
METADATA_KEY = "__metadata__"
_NAME_LIMIT = 1024
_DIMENSION_LIMIT = 64
_SIZE_LIMIT = 2**63 - 1

#: Bytes per element, by the format's dtype names; those that torch can hold.
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
}  # fmt: skip

# First bytes of what people upload by mistake.
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, most likely a .pt file of torch.save",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a Git LFS pointer, whose file 'git lfs pull' fetches",
    b"<": "a web page or XML, perhaps an error page saved under this name",
    b"{": "plain JSON",
}


@dataclass(frozen=True, slots=True)
class Region:
    """Where one tensor's bytes lie: from `begin` up to, not including, `end`, counted from the header's end."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A header that passed the gate. `regions` are in file order."""

    regions: tuple[Region, ...]
    metadata: dict[str, str]
    data_bytes: int


def parse_length(prefix: bytes) -> int:
    """The header's length in bytes, from a file's first bytes (eight, or more to tell foreign files apart).

    Raises:
        CorruptError: `empty_file`, `truncated_header`, `not_safetensors`, `header_length` or `header_too_large`.
    """
    if not prefix:
        raise CorruptError("the file is empty (0 bytes); save the checkpoint again", code="empty_file")
    if len(prefix) < LENGTH_BYTES:
        raise CorruptError(
            f"the file ends after {len(prefix)} bytes, inside the header's 8-byte length; save it again",
            code="truncated_header",
        )
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > HEADER_LIMIT_BYTES:
        _refuse_foreign(prefix)
        raise CorruptError(
            f"the header claims {length} bytes, over the limit of {HEADER_LIMIT_BYTES}; the file is damaged "
            f"or not safetensors, save the checkpoint again",
            code="header_too_large",
        )
    if length < len("{}"):
        raise CorruptError(
            f"the header claims {length} bytes, too few for any; the file is damaged, save it again",
            code="header_length",
        )
    return length


def parse_header(text: bytes) -> Header:
    """Check a header completely.

    Raises:
        CorruptError: `header_not_json`, `bad_entry`, `duplicate_name`, `bad_name`, `no_tensors`, `unknown_dtype`,
            `shape_overflow`, `shape_mismatch`, `overlap` or `hole`.
    """
    entries = _parse_json(text)
    metadata = _check_metadata(entries.pop(METADATA_KEY, {}))
    if not entries:
        raise CorruptError("the file holds no tensors; a checkpoint needs at least one", code="no_tensors")
    regions = sorted((_parse_region(*entry) for entry in entries.items()), key=lambda at: (at.begin, at.end))
    return Header(tuple(regions), metadata, data_bytes=_check_coverage(regions))


def check_name(name: str) -> None:
    """Refuse names that no module has and that could mislead a file system, a log or a terminal.

    Raises:
        CorruptError: `bad_name`.
    """
    if not name or len(name) > _NAME_LIMIT or ".." in name or not name.isprintable() or name == METADATA_KEY:
        shown = ascii(name[:80])
        raise CorruptError(
            f"a tensor is named {shown}; names must be printable, without '..', and 1 to {_NAME_LIMIT} characters "
            f"long, as Module.state_dict() makes them",
            code="bad_name",
        )


def _refuse_foreign(prefix: bytes) -> None:
    start = prefix.lstrip(b" \t\r\n\xef\xbb\xbf")
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            raise CorruptError(
                f"this is not safetensors but {what} (it starts with {prefix[:12]!r}); save the checkpoint as "
                f"safetensors",
                code="not_safetensors",
            )


def _parse_json(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise _not_json("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise _not_json(f"byte {error.start} is not of a text in UTF-8") from None
    except ValueError as error:
        # What follows a semicolon is advice to programmers: how to lift Python's limit on digits.
        raise _not_json(str(error).partition(";")[0][:200]) from None
    if not isinstance(found, dict):
        raise CorruptError(
            f"the header is JSON of type {type(found).__name__}, not an object; the file is not safetensors, "
            f"save the checkpoint again",
            code="header_not_json",
        )
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise CorruptError(
            f"the header names {twice[:80]!a} twice, so its meaning depends on the reader; save the file again",
            code="duplicate_name",
        )
    return found


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _check_metadata(found: object) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CorruptError(
            f"the header's {METADATA_KEY} must map names to texts; the file is damaged, save it again",
            code="bad_entry",
        )
    return found


def _parse_region(name: str, entry: object) -> Region:
    check_name(name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad_entry(name, "must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CorruptError(
            f"tensor {name!r} has the dtype {ascii(dtype)[:80]}; known are {', '.join(DTYPE_BYTES)}",
            code="unknown_dtype",
        )
    if not _is_counts(shape) or len(shape) > _DIMENSION_LIMIT:
        raise _bad_entry(name, f"needs a shape of at most {_DIMENSION_LIMIT} whole numbers from 0 on")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:  # noqa: PLR2004 - begin and end
        raise _bad_entry(name, "needs data_offsets [begin, end] with 0 <= begin <= end")
    region = Region(name, dtype, tuple(shape), begin=offsets[0], end=offsets[1])
    _check_size(region)
    return region


def _check_size(region: Region) -> None:
    # Zero dimensions are left out: a product of zero must not excuse one that no tensor could have.
    if DTYPE_BYTES[region.dtype] * math.prod(max(size, 1) for size in region.shape) > _SIZE_LIMIT:
        raise CorruptError(
            f"tensor {region.name!r} claims more bytes than any machine can address; the file is damaged, save it "
            f"again",
            code="shape_overflow",
        )
    expected = DTYPE_BYTES[region.dtype] * math.prod(region.shape)
    if region.end - region.begin != expected:
        raise CorruptError(
            f"tensor {region.name!r} is {region.dtype}{list(region.shape)}, which takes {expected} bytes, but its "
            f"offsets span {region.end - region.begin}; the file is damaged, save it again",
            code="shape_mismatch",
        )


def _check_coverage(regions: list[Region]) -> int:
    end = 0
    for region in regions:
        if region.begin != end:
            code, what = ("hole", "a gap") if region.begin > end else ("overlap", "an overlap")
            raise CorruptError(
                f"there is {what} before tensor {region.name!r}: it begins at byte {region.begin}, the data "
                f"before it ends at {end}; the file is damaged, save it again",
                code=code,
            )
        end = region.end
    return end


def _is_counts(found: object) -> bool:
    return isinstance(found, list) and all(
        isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= _SIZE_LIMIT for number in found
    )


def _not_json(reason: str) -> CorruptError:
    return CorruptError(
        f"the header is not JSON: {reason}; the file is damaged or not safetensors, save the checkpoint again",
        code="header_not_json",
    )


def _bad_entry(name: str, what: str) -> CorruptError:
    return CorruptError(
        f"the header's entry for tensor {name!r} {what}; the file is damaged, save it again", code="bad_entry"
    )
