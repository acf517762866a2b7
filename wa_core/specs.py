"""What a checkpoint's tensors are called and look like: canonical names, specs, differences, ties.

It knows texts and numbers; no tensor, no file, no torch, so that a header alone can be judged. The invariant: a
name has one canonical form, and two specs are equal only when their tensors may be averaged with each other.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from wa_core.errors import CorruptError, IncompatibleError
from wa_core.header import check_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

#: Metadata entry of a safetensors file: a JSON object that maps a tied tensor's other names to the one written.
TIED_KEY = "tied"
# torch's names of the format's dtypes.
_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
_FORMAT_NAMES = {name: dtype for dtype, name in _TORCH_NAMES.items()}
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module"}
_SHOWN = 5


@dataclass(frozen=True, slots=True, order=True)
class TensorSpec:
    """What a tensor must be to take part in an average. `dtype` is torch's name, such as ``float32``."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def torch_dtype_name(dtype: str) -> str:
    """``float32`` for the format's ``F32``; `dtype` is one that the header gate lets through."""
    return _TORCH_NAMES[dtype]


def format_dtype_name(dtype: str) -> str:
    """``F32`` for torch's ``float32``.

    Raises:
        IncompatibleError: the format has no such dtype (`unsupported_dtype`).
    """
    if dtype not in _FORMAT_NAMES:
        raise IncompatibleError(f"safetensors files have no dtype {dtype!r}", code="unsupported_dtype")
    return _FORMAT_NAMES[dtype]


@lru_cache(maxsize=1 << 16)
def canonical_name(name: str) -> str:
    """`name` without the parts that DDP, `torch.compile` and FSDP insert."""
    *path, last = name.split(".")
    return ".".join([part for part in path if part not in _WRAPPERS] + [last])


def name_collision(name: str) -> IncompatibleError:
    """The error for a name whose canonical form another tensor has already (code `name_collision`)."""
    return IncompatibleError(
        f"{name!r} and another tensor are both {canonical_name(name)!r} without their wrappers' prefixes "
        f"({', '.join(sorted(_WRAPPERS))}); rename one of the modules",
        code="name_collision",
    )


def spec_digest(specs: Iterable[TensorSpec]) -> str:
    """SHA-256, in hex, over names, dtypes and shapes in the order of the names."""
    rows = [[spec.name, spec.dtype, list(spec.shape)] for spec in sorted(specs)]
    return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()


def describe_difference(expected: Iterable[TensorSpec], found: Iterable[TensorSpec]) -> str:
    """One line for people: what is missing, extra and changed, a few of each; empty when nothing differs."""
    wanted, got = ({spec.name: spec for spec in specs} for specs in (expected, found))
    changed = [
        f"tensor {name!r} is {got[name]} but the average holds {spec}"
        for name, spec in wanted.items()
        if name in got and got[name] != spec
    ]
    parts = {
        "missing: ": [f"{name!r} {spec}" for name, spec in wanted.items() if name not in got],
        "extra: ": [f"{name!r} {spec}" for name, spec in got.items() if name not in wanted],
        "": changed,
    }
    return "; ".join(f"{label}{shorten(items)}" for label, items in parts.items() if items)


def check_spec(expected: Sequence[TensorSpec], found: Sequence[TensorSpec]) -> None:
    """Refuse a checkpoint that is not of the architecture being averaged.

    Raises:
        IncompatibleError: `tensors_differ` (names), `shape_changed` or `dtype_changed`.
    """
    if difference := describe_difference(expected, found):
        wanted, got = ({spec.name: spec.shape for spec in specs} for specs in (expected, found))
        code = (
            "tensors_differ"
            if wanted.keys() != got.keys()
            else "dtype_changed"
            if wanted == got
            else "shape_changed"
        )
        raise IncompatibleError(
            f"{difference}; checkpoints of one run must keep their architecture. Start a new average", code=code
        )


def parse_ties(metadata: Mapping[str, str], stored: Collection[str]) -> dict[str, str]:
    """Alias -> name as a file's metadata says.

    Args:
        metadata: the header's texts.
        stored: the names of the tensors that the file holds.

    Raises:
        CorruptError: `bad_ties`, or `bad_name`.
    """
    try:
        ties = json.loads(metadata.get(TIED_KEY, "{}"))
        pairs = list(ties.items())
    except (ValueError, RecursionError, AttributeError):
        raise CorruptError(
            "the metadata entry 'tied' is not a JSON object; save it again", code="bad_ties"
        ) from None
    for alias, name in pairs:
        check_name(alias)
        if not isinstance(name, str) or name not in stored or alias in stored:
            message = (
                f"tensor {alias!r} is said to be tied to {name!a}, which does not fit the file; save it again"
            )
            raise CorruptError(message, code="bad_ties")
    return dict(pairs)


def shorten(items: Sequence[str]) -> str:
    """The first few items on one line, and how many more there are."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
